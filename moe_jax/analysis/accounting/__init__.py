"""What a model has, costs and stores, counted from its configuration. No parameter is ever made."""
