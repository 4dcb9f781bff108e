"""Scoring systems on clients' test rows, PGR and gain recovered, the report."""
