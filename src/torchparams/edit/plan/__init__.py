"""Plans: views with a place to go."""
