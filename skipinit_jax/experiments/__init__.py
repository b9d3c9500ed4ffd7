"""The papers' experiments: grids over recipes, run, stopped and resumed."""
