"""What was found and done, as tables, text and pages."""
