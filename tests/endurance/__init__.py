"""Endurance: many short flows while all around them changes, and the sums afterwards."""
