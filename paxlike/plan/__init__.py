"""Plans: what a step of an experiment would take on hardware that is not here."""
