"""The embedded task: sums of products, its exact critic, and a solver small enough for a laptop."""
