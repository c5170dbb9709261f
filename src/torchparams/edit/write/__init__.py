"""Write plans to disk."""
