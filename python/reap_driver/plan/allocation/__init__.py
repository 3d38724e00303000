"""How many experts each layer loses, and which; pure functions of scores.

`uniform` takes the same share of every layer, `pooled` ranks the experts of all layers together.
Both leave every router enough to choose from, and protected experts where they are. Routers that
choose among groups of experts (n_group > 1) need as many experts in every group, so each group
loses its own lowest, as many as the others. Among equal scores the lower index stays.
"""
