"""From data to tables, pictures, pages and model cards."""
