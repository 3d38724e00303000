"""Numbers of experts that serving engines have kernels for: suggested, never forced."""

from collections.abc import Sequence

from reap_driver.plan.allocation.budget import Budget, ratio_of

# Serving engines build their kernels for these numbers of experts: powers of two, then multiples.
SERVED_STEP = 64


def is_served(experts: int) -> bool:
    """Whether serving engines usually have kernels for this number of experts in a layer."""
    return experts % SERVED_STEP == 0 if experts > SERVED_STEP else experts & (experts - 1) == 0


def served_advice(budgets: Sequence[Budget]) -> list[str]:
    """For each number of experts engines may not serve, the ratios of the next ones they do."""
    advice = {}
    for budget in budgets:
        total, kept = budget.num_experts, budget.kept
        possible = range(total - budget.most, total)
        fit = [n for n in possible if is_served(n) and n % budget.n_group == 0]
        near = [max((n for n in fit if n < kept), default=0)]
        near += [min((n for n in fit if n > kept), default=0)]
        if budget.removed and not is_served(kept) and any(near):
            offers = [f"{n} (ratio {ratio_of(total - n, total):g})" for n in near if n]
            advice[kept, total] = (
                f"keeps {kept} of {total} experts a layer; serving engines are surest to have "
                f"kernels for {' or '.join(offers)}"
            )
    return list(advice.values())
