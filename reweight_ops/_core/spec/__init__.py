"""What a loss is: data only."""
