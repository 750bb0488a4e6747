"""What the planner and its simulations are worth, on real data."""
