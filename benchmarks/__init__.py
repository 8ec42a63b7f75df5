"""What is measured, each by one command that prints its figures beside their targets."""
