"""From statistics to a plan: criteria, allocation, uncertainty. Needs no model, only statistics."""
