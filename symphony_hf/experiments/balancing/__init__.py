"""`symphony balance`: what the ways to balance the experts' load do to it, and to specialization by domain."""
