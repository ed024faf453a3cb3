"""Studies, populations and their statistics, as functions; the commands beside this room call them."""
