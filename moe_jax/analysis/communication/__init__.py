"""What an expert-parallel layer sends through a simulated machine."""
