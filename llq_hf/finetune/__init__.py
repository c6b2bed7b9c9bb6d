"""LoRA fine-tuning of packed models: QLoRA and IR-QLoRA on any method's base.

peft holds the adapters, transformers' Trainer trains them, datasets feeds it. Ours are: the rows
and what is learned from each (`rows`), IR-QLoRA's connections and their merge (`elastic`), the
folder with an adapter that knows its base (`folder`), and the run that joins them and can be killed
(`train`).
"""
