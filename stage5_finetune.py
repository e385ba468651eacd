"""Stage 5: iterative deliberation finetuning (section 4.5), and the training loop that stage 0 shares.

    python stage5_finetune.py --model runs/x/iter0/model --data runs/x/iter1/deliberations.jsonl --out runs/x/iter1/model

Continues from the last iteration's policy on D_delib and minimises -log pi(e | u) over the agent's tokens
(equation 7; stage 0 calls the same loop for equation 2). The trajectories mix steps that deliberate with steps
that do not, so the policy also learns when to deliberate. 3 epochs in the first iteration, 1 in later ones
(section 5.3). `accelerate launch` trains on several devices. A row of --data is a trajectory:

    {"key": "scienceworld/find-animal/12", "task": "scienceworld/find-animal/12", "instruction": "...",
     "steps": [{"thought": "...", "action": "look around", "observation": "...", ...}, ...], "reward": 1.0, ...}

OUT is a plain checkpoint with the losses in training.json. It appears in one step; until then OUT.part has
checkpoints, from which the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path

from common import (Provenance, UserError, dialogue, duration, forget_other_training, label_of, locked, prompt_path, publish,
                    run_stage, settings_of)
from environments import read_trajectories
from prompts.model import (ChatFormat, add_chat_options, add_report_option, bfloat16_is_fast, check_model_folder, check_saving,
                           generation_config, save_checkpoint, tracking)

CHECKPOINTS = 5  # of a training; a kill costs the steps since the last one


def add_training_options(parser: argparse.ArgumentParser, *, epochs: int) -> None:
    """The options of every stage that trains."""
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the model to start from: a folder or hub name")
    parser.add_argument("--data", required=True, metavar="JSONL", help="trajectories, one a row")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the finetuned model goes")
    group = parser.add_argument_group("finetuning (section 5.3)")
    group.add_argument("--epochs", type=float, default=epochs, help="default: %(default)s")
    group.add_argument("--as-long-as", metavar="FOLDER", help="instead of --epochs: as many training tokens as this model "
                       "had, prompts and observations included (token-matched); epochs and steps follow")
    group.add_argument("--learning-rate", type=float, default=1e-5, help="of a cosine schedule; default: %(default)s")
    group.add_argument("--warm-up", type=float, default=0.03, help="the share of steps in which the learning rate rises; a short "
                       "training needs more; default: %(default)s")
    group.add_argument("--batch-size", type=int, default=64, help="trajectories a step, of all devices; default: %(default)s")
    group.add_argument("--micro-batch-size", type=int, default=1, help="those at once on a device; default: %(default)s")
    group.add_argument("--lora-rank", type=int, default=0, help="of an adapter, merged at the end; 0 trains all; default: %(default)s")
    group.add_argument("--max-model-len", type=int, default=8192, help="longest sequence, in whole steps; default: %(default)s")
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    add_chat_options(group)
    add_report_option(parser)


# --- What is learnt -----------------------------------------------------------------------------------------------


def training_sequences(rows: list[dict], chat: ChatFormat, longest: int) -> tuple[list[dict], int]:
    """One sequence of at most `longest` tokens a trajectory, all its turns in it; and how many had to be cut.

    Failed attempts are shown and not learnt.
    """
    sequences, cut = [], 0
    for row in rows:
        turns = dialogue(row["task"], row["instruction"], row["steps"])[:-1]  # nothing is learnt after the last action
        learnt = [is_step for step in row["steps"] for is_step in (*[False] * len(step.get("failed_attempts", ())), True)]
        unlearnt = {2 * place + 1 for place, is_step in enumerate(learnt) if not is_step}
        ids, labels = supervised_tokens(turns, chat, longest, unlearnt)
        cut += len(ids) < len(chat.encode(turns))
        if ids:
            sequences.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return sequences, cut


def supervised_tokens(turns: list[str], chat: ChatFormat, longest: int, unlearnt: Collection[int] = ()
                      ) -> tuple[list[int], list[int]]:
    """(ids, labels) of a dialogue that ends with the agent: labels are -100 but for the agent's turns and their
    end-of-turn token (the loss of equations 2 and 7), less the turns numbered in `unlearnt`. Whole steps that
    do not fit in `longest` tokens are left out."""
    ids: list[int] = []
    labels: list[int] = []
    for i, piece in enumerate(chat.pieces(turns)):
        if i % 2:
            if len(ids) + len(piece) + 1 > longest:
                break
            turn = [*piece, chat.end_of_turn]
            ids += turn
            labels += [-100] * len(turn) if i in unlearnt else turn
            whole = len(ids)
        else:
            rest = piece if i == 0 else piece[1:]  # the end-of-turn token went with the agent's turn
            ids += rest
            labels += [-100] * len(rest)
    else:
        return ids, labels
    return (ids[:whole], labels[:whole]) if i > 1 else ([], [])


def keep_supervised_logits(batch: dict) -> dict:
    """Have the model compute logits only where the agent's tokens are predicted, a tenth to a third of a
    trajectory.

    batch: tensors of shape (sequences, tokens), labels of -100 where nothing is learnt. Added are the K
    positions before a learnt token of any sequence, logits_to_keep, and the tokens that follow there,
    shift_labels of shape (sequences, K): both are transformers' own terms. The model's loss is then the mean of
    -log pi over the agent's tokens.
    """
    following = batch["labels"][:, 1:]
    positions = (following != -100).any(dim=0).nonzero().squeeze(1)
    return batch | {"shift_labels": following[:, positions], "logits_to_keep": positions}


# --- The loop -----------------------------------------------------------------------------------------------------


def load_model(args: argparse.Namespace):
    """(model in fp32, tokenizer, the dtype that its checkpoint is stored in)"""
    import torch
    from accelerate import PartialState
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Of processes that know of each other only one reads the weights, where the model is sharded.
        PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        stored_as = AutoConfig.from_pretrained(args.model).dtype or torch.float32
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"transformers cannot load the model '{args.model}': {str(error).splitlines()[0]}") from None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.generation_config = generation_config(model)
    check_saving(model, tokenizer)
    return model, tokenizer, stored_as


def make_trainer(model, tokenizer, sequences: list[dict], args: argparse.Namespace, folder: Path):
    """transformers' Trainer for the options of `add_training_options`; it keeps its checkpoints in `folder`."""
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded and args.lora_rank:
        raise UserError("--lora-rank: an adapter is merged into whole weights, and FSDP shards them; train all weights, or "
                        "launch with `accelerate launch --multi_gpu`")
    together = args.micro_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % together:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of the {together} trajectories that all devices "
                        "take at once; change it or --micro-batch-size")
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank,
                                                 target_modules="all-linear", task_type="CAUSAL_LM"))
    on_gpu = torch.cuda.is_available()
    large = model.num_parameters() > 1e9  # a smaller one's activations fit on a GPU; computing them twice takes time
    reports = tracking(args.report_to, Path(args.out).absolute().parent)  # beside the model, where its evaluations go, too
    arguments = TrainingArguments(
        output_dir=str(folder), num_train_epochs=args.epochs, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=round(args.warm_up * args.epochs * len(sequences) / args.batch_size),
        per_device_train_batch_size=args.micro_batch_size, gradient_accumulation_steps=args.batch_size // together,
        # Else each device holds whole gradients, in bf16, while it accumulates.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": sharded}},
        # On a CPU, casting the weights to bf16 costs more than it saves.
        gradient_checkpointing=on_gpu and large and not sharded, bf16=on_gpu and bfloat16_is_fast(), use_cpu=not on_gpu,
        # Tasks of one type are of about one length: grouped, a step learns from few of them. Only padding is
        # worth that.
        train_sampling_strategy="group_by_length" if args.micro_batch_size > 1 else "random",
        logging_steps=1, save_strategy="steps", save_steps=1 / CHECKPOINTS, save_total_limit=1,
        seed=args.seed, **reports, disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=on_gpu)
    arguments._n_gpu = min(1, arguments.n_gpu)  # a process trains on one device; accelerate starts one for each
    pad = DataCollatorForSeq2Seq(tokenizer)
    trainer = Trainer(model=model, train_dataset=sequences, args=arguments,
                      data_collator=lambda rows: keep_supervised_logits({**pad(rows)}))
    trainer.remove_callback(PrinterCallback)  # the losses go to training.json and the summary line
    trainer.add_callback(no_checkpoint_at_the_end())
    return trainer


def no_checkpoint_at_the_end():
    """A callback: a checkpoint is three times as large as the model, which is about to be written itself."""
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save &= state.global_step < state.max_steps

    return Callback()


def finetune(args: argparse.Namespace) -> None:
    """Finetune args.model on the trajectories of args.data, one sequence a trajectory; write a checkpoint to
    args.out."""
    with locked(Path(args.out)) if int(os.environ.get("RANK", 0)) == 0 else contextlib.nullcontext():
        rows = read_trajectories(args.data)
        check_model_folder(args.model)
        started = time.time()
        model, tokenizer, stored_as = load_model(args)
        sequences, cut = training_sequences(rows, ChatFormat(tokenizer, args.chat_args), args.max_model_len)
        if not sequences:
            raise UserError(f"{args.data}: no trajectory fits in {args.max_model_len} tokens; raise --max-model-len")
        tokens = sum(len(sequence["input_ids"]) for sequence in sequences)
        if args.as_long_as:
            args.epochs = training_tokens(args.as_long_as) / tokens
        part = Path(args.out).with_name(Path(args.out).name + ".part")
        trainer = make_trainer(model, tokenizer, sequences, args, part)
        inputs = [args.data, args.model, prompt_path(label_of(rows[0]["task"])),
                  *([Path(args.as_long_as) / "training.json"] if args.as_long_as else [])]
        provenance = Provenance(settings_of(args), inputs, [finetune]) if trainer.is_world_process_zero() else None
        train(trainer, tokenizer, stored_as, part, provenance)
        if provenance is None:
            return
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        learnt = sum(label != -100 for sequence in sequences for label in sequence["labels"])
        publish(part, Path(args.out), provenance, {
            "settings": settings_of(args), "trajectories": len(sequences), "tokens": tokens, "agent_tokens": learnt,
            "optimizer_steps": trainer.state.global_step, "losses": losses, "seconds": round(time.time() - started)})
    print(f"{len(sequences)} trajectories ({tokens} tokens, {learnt} of them the agent's; {cut} cut at {args.max_model_len} "
          f"tokens) x {args.epochs:g} epochs, {trainer.state.global_step} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}; "
          f"{args.out}; {duration(time.time() - started)}")


def train(trainer, tokenizer, stored_as, part: Path, provenance: Provenance | None) -> None:
    """Train on from the last checkpoint in `part` to part/finished. Only the main process has provenance."""
    import torch
    from safetensors import SafetensorError
    from transformers.trainer_utils import get_last_checkpoint
    if provenance:
        forget_other_training(part, provenance.fingerprint())
    trainer.accelerator.wait_for_everyone()
    checkpoint = get_last_checkpoint(part)
    if checkpoint and provenance:
        print(f"going on from {checkpoint}", file=sys.stderr)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        model = trainer.model.merge_and_unload() if hasattr(trainer.model, "merge_and_unload") else trainer.model_wrapped
        weights = trainer.accelerator.get_state_dict(model)  # from all devices, whole in the main process
        if provenance:
            save_checkpoint(weights, trainer.model, stored_as, part / "finished")
            tokenizer.save_pretrained(part / "finished")
    except torch.OutOfMemoryError:
        raise UserError("out of memory; lower --micro-batch-size or --max-model-len, or launch it on more devices, "
                        "sharded, as the Makefile's LAUNCH of PROFILE=paper does; the same command goes on from the last "
                        "checkpoint") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStream" not in str(error):
            raise
        raise UserError(f"{part}: cannot be written or read ({str(error).splitlines()[0]}); make room, then the same "
                        "command goes on from the last checkpoint; delete one that cannot be read") from None


def training_tokens(model: str) -> float:
    """How many tokens a model was finetuned on, epochs times sequences, by the training.json in its folder."""
    try:
        made = json.loads((Path(model) / "training.json").read_text())
        return made["tokens"] * made["settings"]["epochs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{model}/training.json: does not say how long that model was trained ({error}); --as-long-as names a "
                        "model that stage 0 or stage 5 has written") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_options(parser, epochs=3)
    finetune(parser.parse_args())


if __name__ == "__main__":
    run_stage(main)
