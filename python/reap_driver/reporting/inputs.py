"""What a report shows, checked: statistics, their scores, and optionally a plan."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from reap_driver.planning.criteria import Scores, known_criterion
from reap_driver.planning.plan import Plan
from reap_driver.planning.public_provenance import live_mode, public_name
from reap_driver.planning.scoring import score
from reap_driver.planning.stability import (
    Uncertainty,
    group_scores,
    keep_probability,
    margin,
    uncertainty,
)
from reap_driver.reporting.measures import NEAR, LayerMeasures, measure
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, PlanError
from reap_kernels.model_match import differences

DEFAULT_CRITERION = "reap"


@dataclass(frozen=True)
class Inputs:
    """Statistics, their scores and optionally a plan, all of the same model.

    Attributes:
        stats: observed statistics.
        plan: which experts are kept; None shows the statistics alone.
        scores: the scores that the pictures show.
    """

    stats: SaliencyStats
    plan: Plan | None
    scores: Scores

    @classmethod
    def checked(cls, stats: SaliencyStats, plan: Plan | None, criterion: str | None) -> Inputs:
        """Scores the statistics by `criterion`, or else by the plan's criterion and weights. A plan
        whose criterion is not built in is shown with scores of the default criterion.

        Raises:
            PlanError: the plan was made for another model, or has another number of experts in a
                layer; the criterion is unknown; the plan's weights do not fit the groups.
            DataError: the statistics cannot be scored; see `reap_driver.score`.
        """
        if plan is not None:
            plan = plan.covering({name: la.num_experts for name, la in stats.layers.items()})
            _check_plan(stats, plan)
        own = plan is not None and known_criterion(plan.criterion) is None
        chosen = criterion or (DEFAULT_CRITERION if plan is None or own else plan.criterion)
        weights = None if plan is None else plan.weights
        return cls(stats, plan, score(stats, chosen, weights))

    @property
    def model(self) -> str:
        """Name of the model, without a path."""
        known = self.stats.provenance.get("model") or {}
        return public_name(str(known.get("id") or "a model"))

    @property
    def cutting(self) -> Plan | None:
        """The plan, if it removes experts; one that removes neurons alone has no cut among them."""
        plan = self.plan
        return plan if plan and any(layer.removed for layer in plan.layers.values()) else None

    @cached_property
    def layers(self) -> list[LayerMeasures]:
        """The measures of every observed layer."""
        inside = None
        if self.cutting is not None and self.doubt is None:
            inside = margin(keep_probability(self.stats, self.cutting))
        return measure(self.stats, self.scores, self.cutting, inside)

    @cached_property
    def doubt(self) -> str | None:
        """Why the decision margin is not known; None where it is."""
        if len(self.stats.parts) < 2:
            if live_mode(self.stats.provenance) is not None:
                return (
                    "Statistics of live traffic have no folds, so which decisions other traffic "
                    "would change is not known; save them twice, at other times, and compare."
                )
            return (
                "The statistics were not kept in folds, so which decisions another sample of the "
                "data would change is not known; observe with --folds 8 to see it here."
            )
        if self.plan is not None and self.plan.criterion != self.scores.criterion:
            return (
                "The scores shown are by another criterion than the plan's, so the plan's margin "
                "is not shown."
            )
        found = known_criterion(self.scores.criterion)
        if found is None or not found.is_sum:
            return (
                f"Scores by {self.scores.criterion} are not a function of sums, so their margin "
                "cannot be estimated from folds of the data."
            )
        try:
            _ = self._uncertainty
        except DataError as error:  # one short sequence has tokens in one part only
            return f"The decision margin cannot be estimated: {error}."
        return None

    @property
    def near(self) -> str:
        """How experts near the cut are described on the page."""
        return f"within {100 * NEAR:g} % of the cut" if self.doubt else "in the decision margin"

    @cached_property
    def uncertainty(self) -> dict[str, Uncertainty]:
        """Layer -> uncertainty of its scores; empty where it is not known."""
        return {} if self.doubt is not None else self._uncertainty

    @cached_property
    def _uncertainty(self) -> dict[str, Uncertainty]:
        return uncertainty(self.stats, self.scores.criterion, self.scores.weights)

    @cached_property
    def single_groups(self) -> dict[str, Scores]:
        """Scores by each group alone; empty if some group did not reach every layer."""
        reached = all(bool(layer.tokens.all()) for layer in self.stats.layers.values())
        return group_scores(self.stats, self.scores.criterion) if reached else {}

    @property
    def protected(self) -> int:
        """Number of experts that the plan was told to keep whatever their score."""
        named = {} if self.plan is None else self.plan.settings.get("protected", {})
        return sum(len(experts) for experts in named.values())

    def notes(self) -> list[str]:
        """What a reader must know before looking at the pictures."""
        found = []
        plan, unobserved = self.plan, self.scores.unobserved
        if plan is not None:
            found += plan.notes
            other = differences(plan.record, self.stats.provenance).text
            if other:
                found.append(
                    "The configuration of the model the plan was made for (there) differs from "
                    f"that of the model observed (here): {other}."
                )
            if plan.criterion != self.scores.criterion:
                found.append(
                    f"The plan was made by {plan.criterion}; the scores shown are by "
                    f"{self.scores.criterion}."
                )
            elif plan.scores_digest != self.scores.digest():
                found.append(
                    "The plan was made from other scores than these statistics give (their digests "
                    "differ): the cut shown is the plan's, the scores are those of the statistics."
                )
        found += [text for text in self.scores.notes if text not in found]
        if unobserved:
            found.append(
                f"No token reached {len(unobserved)} of the MoE layers, which are not shown: "
                f"{', '.join(unobserved[:4])}{', ...' if len(unobserved) > 4 else ''}."
            )
        return found


def _check_plan(stats: SaliencyStats, plan: Plan) -> None:
    """Raises PlanError unless the plan was made for the model that was observed."""
    for name, layer in stats.layers.items():
        planned = plan.layers[name]
        if planned.num_experts != layer.num_experts:
            raise PlanError(
                f"plan: layer {name} has {planned.num_experts} experts in the plan, but "
                f"{layer.num_experts} in the statistics; give a plan made from these statistics"
            )
    found = differences(plan.record, stats.provenance)
    if found.deciding or found.unnamed:
        model = stats.provenance.get("model") or {}
        raise PlanError(
            f"plan: made for {plan.model.get('id')!r} (there), but the statistics are of "
            f"{model.get('id')!r} (here): {found.text}; give a plan made from these statistics"
        )
