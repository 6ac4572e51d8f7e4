"""Plans: what each layer costs and what pruning it does to the loss, measured, and the best choice under a target."""
