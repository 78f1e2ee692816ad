"""Hugging Face's Trainer: a small language model, made from a config, goes on with sequences that are made here."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lookbehind_fused import Lookbehind
from lookbehind_fused.integrations.transformers import WholeSteps


class SharpnessAwareTrainer(WholeSteps, Trainer):
    """The one line: all gradients of a step, over all of its accumulated batches."""


def samples(number, seed):
    """Arithmetic sequences of 12 tokens, modulo 32."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(32, (number, 1), generator=generator)
    tokens = (first + torch.randint(1, 5, (number, 1), generator=generator) * torch.arange(12)) % 32
    return [{"input_ids": x, "labels": x} for x in tokens]


def accuracy(evaluated):
    """Of what follows two tokens or more."""
    guesses, tokens = evaluated.predictions.argmax(-1), evaluated.label_ids
    return {"accuracy": (guesses[:, 1:-1] == tokens[:, 2:]).mean()}


torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(config)

with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=4,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SharpnessAwareTrainer(
        model,
        arguments,
        train_dataset=samples(960, seed=1),
        eval_dataset=samples(400, seed=2),
        compute_metrics=accuracy,
        optimizer_cls_and_kwargs=(Lookbehind, {"base_optimizer": torch.optim.AdamW, "lr": 1e-2, "rho": 0.05, "k": 2}),
    )
    trainer.train()
    metrics = trainer.evaluate()
print(f"accuracy {metrics['eval_accuracy']:.3f}")
