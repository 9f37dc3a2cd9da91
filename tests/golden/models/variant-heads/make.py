#!/usr/bin/env python3
"""Makes the folders beside it:  pip install torch transformers && python3 make.py

DistilBERT's and ELECTRA's heads with random weights N(0, 0.2), each asked by transformers' own class in float64, eval mode, a row at a time.
"""
import copy
import json
import os
import shutil

import torch
import transformers
from safetensors.torch import save_file
from transformers import DistilBertConfig, ElectraConfig

HERE = os.path.dirname(os.path.abspath(__file__))
VOCAB = os.path.join(HERE, "..", "tiny-pretrain", "vocab.txt")
NAMES = dict(id2label={0: "O", 1: "B-PER", 2: "I-PER"}, label2id={"O": 0, "B-PER": 1, "I-PER": 2})
DISTIL = DistilBertConfig(vocab_size=200, dim=8, hidden_dim=16, n_layers=1, n_heads=2, max_position_embeddings=16, **NAMES)
ELECTRA = ElectraConfig(vocab_size=200, hidden_size=8, embedding_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=16, **NAMES)
ROWS = [[2, 88, 91, 4, 77, 3], [2, 60, 4, 99, 100, 3, 71, 3]]
SEGMENTS = [[0] * 6, [0] * 6 + [1] * 2]
JOBS = [("DistilBertForTokenClassification", DISTIL), ("DistilBertForQuestionAnswering", DISTIL), ("DistilBertForMultipleChoice", DISTIL),
        ("ElectraForMaskedLM", ELECTRA), ("ElectraForSequenceClassification", ELECTRA), ("ElectraForTokenClassification", ELECTRA),
        ("ElectraForQuestionAnswering", ELECTRA)]


def ask(model, name, ids, segments):
    inputs = {"input_ids": torch.tensor([ids])}
    if name.startswith("Electra"):
        inputs["token_type_ids"] = torch.tensor([segments])
    if name.endswith("MultipleChoice"):
        inputs = {k: v[None] for k, v in inputs.items()}
    with torch.no_grad():
        out = model(**inputs)
    if name.endswith("QuestionAnswering"):
        return torch.stack([out.start_logits[0], out.end_logits[0]], -1)
    return out.logits[0] if out.logits.dim() == 3 else out.logits


for seed, (name, config) in enumerate(JOBS):
    folder = os.path.join(HERE, name)
    shutil.rmtree(folder, ignore_errors=True)
    config = copy.deepcopy(config)
    if name.endswith("QuestionAnswering"):
        config.num_labels = 2
    model = getattr(transformers, name)(config)
    g = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.LayerNorm)}
    with torch.no_grad():
        for _, p in model.named_parameters():   # a tied tensor comes once
            p.copy_(torch.randn(p.shape, generator=g) * 0.2 + (1.0 if id(p) in norms else 0.0))
    model.save_pretrained(folder)
    if os.path.exists(f"{folder}/generation_config.json"):
        os.remove(f"{folder}/generation_config.json")
    os.chmod(f"{folder}/model.safetensors", 0o644)
    shutil.copyfile(VOCAB, f"{folder}/vocab.txt")
    model = getattr(transformers, name).from_pretrained(folder, attn_implementation="eager").eval()
    got = torch.cat([ask(model, name, i, s) for i, s in zip(ROWS, SEGMENTS)])
    model.double()
    want = torch.cat([ask(model, name, i, s) for i, s in zip(ROWS, SEGMENTS)]).float()
    save_file({"logits": want.contiguous()}, f"{folder}/golden.safetensors")
    os.chmod(f"{folder}/golden.safetensors", 0o644)
    print(f"| {name} | {list(want.shape)} | {want.abs().max():.3g} | {(want - got).abs().max():.2e} |")
with open(f"{HERE}/rows.json", "w") as f:
    json.dump([{"input_ids": i, "token_type_ids": s} for i, s in zip(ROWS, SEGMENTS)], f)
