"""One call of a live model, counted on shapes alone: every operation has a price, at any size the model takes."""
