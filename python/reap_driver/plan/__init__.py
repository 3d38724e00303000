"""From statistics to a plan: criteria, allocation, uncertainty. Knows statistics only."""
