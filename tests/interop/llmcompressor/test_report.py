"""The report of llm-compressor's REAP and our plan say the same of a model, both ways."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import reap_driver as rd
from reap_driver.integrations.llm_compressor import KernelREAPPruningModifier
from reap_driver.interchange import llm_compressor_report
from reap_driver.interchange.content import ModelFacts, Source
from tests.interop.llmcompressor.runs import TRAINED, run, text_rows, trained


def test_a_plan_from_the_report_prunes_to_the_same_checkpoint(tmp_path: Path) -> None:
    report = tmp_path / "kept.json"
    theirs = trained()
    facts = ModelFacts(rd.record_of(theirs))
    modifier = KernelREAPPruningModifier(sparsity=0.25, report_path=str(report))
    found = run(theirs, [modifier], text_rows(), pipeline="basic")
    plan = llm_compressor_report.read(report, facts)
    assert [list(layer.kept) for layer in plan.layers.values()] == [o.kept for o in found]
    rd.apply_plan(TRAINED, plan, tmp_path / "pruned")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    ids = torch.tensor([text_rows(1)[0]["input_ids"]])
    with torch.no_grad():
        difference = ours(ids).logits - theirs(ids).logits
    assert ours.config.num_experts == theirs.config.num_experts == 24
    assert float(difference.abs().max()) < 1e-4
    llm_compressor_report.write(tmp_path / "again.json", Source(facts, plan=plan))
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(report.read_text())
