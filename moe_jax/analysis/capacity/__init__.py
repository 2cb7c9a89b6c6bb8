"""What capacity costs: methods trained at several capacity factors, and each evaluated at several."""
