"""What a run tells its user: the summary, the closing table, pictures, histories, evaluation tables."""
