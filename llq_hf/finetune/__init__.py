"""LoRA fine-tuning of packed models: QLoRA and IR-QLoRA on any method's base.

peft holds the adapters, transformers' Trainer trains them, datasets feeds the Trainer. This folder
adds what is missing: the rows and their tokens (`rows`), IR-QLoRA's connections and their merge
(`elastic`), and a run that can be killed and resumed (`trainer`). `checkpoints/adapter.py` makes
sure that an adapter is loaded on its own base.
"""
