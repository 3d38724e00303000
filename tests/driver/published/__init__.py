"""Published configurations, checkpoints in their disk layout, and the pipeline run on them."""
