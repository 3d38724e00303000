"""What a report is made of, checked: statistics, and perhaps a plan and a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from reap_driver.plan.criteria import Scores, known_criterion
from reap_driver.plan.plan import Plan
from reap_driver.plan.published import public_name
from reap_driver.plan.scoring import score
from reap_driver.plan.stability import (
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
    """Statistics with their scores and, if there is one, a plan of the same model.

    Attributes:
        stats: observed statistics.
        plan: which experts stay; None for none.
        scores: what the pictures show.
    """

    stats: SaliencyStats
    plan: Plan | None
    scores: Scores

    @classmethod
    def checked(cls, stats: SaliencyStats, plan: Plan | None, criterion: str | None) -> Inputs:
        """Scores the statistics by the plan's criterion and weights, or by `criterion`. Where the
        plan's was brought from elsewhere and cannot be computed here, by the default one.

        Raises:
            PlanError: the plan is of another model, or counts other experts in a layer; the
                criterion is unknown, or the weights do not fit.
            DataError: see `reap_driver.score`.
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
        """Name of the model."""
        known = self.stats.provenance.get("model") or {}
        return public_name(str(known.get("id") or "a model"))

    @cached_property
    def layers(self) -> list[LayerMeasures]:
        """The measures of every observed layer."""
        inside = None
        if self.plan is not None and self.doubt is None:
            inside = margin(keep_probability(self.stats, self.plan))
        return measure(self.stats, self.scores, self.plan, inside)

    @cached_property
    def doubt(self) -> str | None:
        """Why it is not known which experts are inside the decision margin; None where it is."""
        if len(self.stats.parts) < 2:
            return (
                "The statistics were not kept in parts, so which decisions another sample of the "
                "data would change is not known; observe with --folds 8 to see it here."
            )
        if self.plan is not None and self.plan.criterion != self.scores.criterion:
            return "Scores are by another criterion than the plan's, so its margin is not shown."
        found = known_criterion(self.scores.criterion)
        if found is None or not found.is_sum:
            return (
                f"{self.scores.criterion} is no function of sums, so parts of the data say nothing "
                "about its margin."
            )
        try:
            _ = self._uncertainty
        except DataError as error:  # one short sequence has tokens in one part only
            return f"How sure the decisions are cannot be told: {error}."
        return None

    @property
    def near(self) -> str:
        """What experts close to the cut are, in words."""
        return f"within {100 * NEAR:g} % of the cut" if self.doubt else "inside the margin"

    @cached_property
    def uncertainty(self) -> dict[str, Uncertainty]:
        """Of the scores; empty where it is not known."""
        return {} if self.doubt is not None else self._uncertainty

    @cached_property
    def _uncertainty(self) -> dict[str, Uncertainty]:
        return uncertainty(self.stats, self.scores.criterion, self.scores.weights)

    @cached_property
    def single_groups(self) -> dict[str, Scores]:
        """Scores by each group alone; empty where one of them did not reach every layer."""
        reached = all(bool(layer.tokens.all()) for layer in self.stats.layers.values())
        return group_scores(self.stats, self.scores.criterion) if reached else {}

    @property
    def protected(self) -> int:
        """Experts the plan was told to keep whatever they score."""
        named = {} if self.plan is None else self.plan.settings.get("protected", {})
        return sum(len(experts) for experts in named.values())

    def notes(self) -> list[str]:
        """What a reader must know before the pictures."""
        found = []
        plan, unobserved = self.plan, self.scores.unobserved
        if plan is not None:
            found += plan.notes
            other = differences(plan.record, self.stats.provenance).text
            if other:
                found.append(
                    "The plan was made for a model (there) whose configuration differs from that "
                    f"of the model observed (here): {other}."
                )
            if plan.criterion != self.scores.criterion:
                found.append(
                    f"The plan was made by {plan.criterion}; the scores shown are by "
                    f"{self.scores.criterion}."
                )
            elif plan.scores_digest != self.scores.digest():
                found.append(
                    "The plan was made from other scores than these statistics give (digests "
                    "differ): the cut is the plan's, the scores are these statistics'."
                )
        if unobserved:
            found.append(
                f"{len(unobserved)} MoE layers were reached by no token and are not shown: "
                f"{', '.join(unobserved[:4])}{', ...' if len(unobserved) > 4 else ''}."
            )
        return found


def _check_plan(stats: SaliencyStats, plan: Plan) -> None:
    """The plan is one of the model that was observed."""
    for name, layer in stats.layers.items():
        planned = plan.layers[name]
        if planned.num_experts != layer.num_experts:
            raise PlanError(
                f"plan: layer {name} was observed with {layer.num_experts} experts, the plan says "
                f"{planned.num_experts} experts; give a plan made from these statistics"
            )
    found = differences(plan.record, stats.provenance)
    if found.deciding or found.unnamed:
        model = stats.provenance.get("model") or {}
        raise PlanError(
            f"plan: made for {plan.model.get('id')!r} (there), but the statistics are of "
            f"{model.get('id')!r} (here): {found.text}; give a plan made from these statistics"
        )
