"""Scoring systems on clients' test rows; PGR, gain recovered and intervals."""
