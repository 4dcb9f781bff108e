"""What the Grad-Transformer is compared with: the controls of DESIGN.md section 6."""
