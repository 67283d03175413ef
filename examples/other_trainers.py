# Copyright 2026 The galore_jax Authors
# SPDX-License-Identifier: Apache-2.0
"""GaLore in other libraries' own trainers: their model, their training loop and their checkpoints, with AdamW and with GaLore.

    python examples/other_trainers.py tunix        # or keras, levanter, maxtext; needs that package beside galore_jax

Each function trains with a transformation, saves and restores with the library's own means, and returns the losses and what there
was before and after.
"""

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from other_libraries import BATCH, HEADS, LAYERS, LENGTH, WIDTH, batches

from galore_jax import describe, galore_adamw, tree_bytes

Make = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]


class Run(NamedTuple):
    """What a trainer makes of a transformation."""

    losses: list[float]
    tx: optax.GradientTransformation
    params: Any  # the tree that it was initialized with
    state: Any
    restored: Any  # the pair of both, from the checkpoint


def tunix(make: Make, rate: float, steps: int, folder: str) -> Run:
    """``PeftTrainer`` takes a transformation, and trains all parameters of a model without LoRA."""
    from flax import nnx
    from tunix.models.llama3 import model as llama
    from tunix.sft import peft_trainer, utils

    def trainer(seed):
        config = llama.ModelConfig(
            num_layers=LAYERS, vocab_size=256, embed_dim=WIDTH, hidden_dim=4 * WIDTH, num_heads=HEADS,
            head_dim=WIDTH // HEADS, num_kv_heads=2, rope_theta=10_000, norm_eps=1e-5, weight_tying=False,
        )  # fmt: skip
        settings = peft_trainer.TrainingConfig(
            eval_every_n_steps=steps, max_steps=steps, checkpoint_root_directory=folder
        )
        made = peft_trainer.PeftTrainer(llama.Llama3(config, rngs=nnx.Rngs(seed)), make(rate), settings)
        return made.with_gen_model_input_fn(inputs)

    def inputs(batch):
        mask = batch.input_mask
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": mask,
            "positions": utils.build_positions_from_mask(mask),
            "attention_mask": utils.make_causal_attn_mask(mask),
        }

    def trained(made):
        return nnx.state(made.model, nnx.Param), nnx.state(made.optimizer, nnx.optimizer.OptState)["opt_state"]

    first = trainer(seed=0)
    first.train(
        peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones(tokens.shape, bool)) for tokens in batches()
    )
    losses = first.metrics_logger.get_metric_history("", "loss", "train")
    return Run(losses, make(rate), *trained(first), trained(trainer(seed=1)))


def keras(make: Make, rate: float, steps: int, folder: str) -> Run:
    """An optimizer of Keras whose variables are the transformation's state, for ``fit`` and ``model.save``."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras

    class Optax(keras.optimizers.Optimizer):
        def build(self, variables):
            super().build(variables)
            # Updates are proportional to the learning rate, which Keras schedules.
            self.tx = make(1.0)
            leaves, self.structure = jax.tree.flatten(self.tx.init({v.path: v.value for v in variables}))
            self.state = [self.add_variable(x.shape, lambda *_, x=x, **__: x, str(x.dtype)) for x in leaves]

        def _backend_update_step(self, grads, variables, learning_rate):
            paths = [v.path for v in variables]
            state = self.structure.unflatten(v.value for v in self.state)
            grads, params = (dict(zip(paths, values, strict=True)) for values in (grads, [v.value for v in variables]))
            updates, state = self.tx.update(grads, state, params)
            for variable in variables:
                variable.assign_add(learning_rate * updates[variable.path])
            for variable, value in zip(self.state, jax.tree.leaves(state), strict=True):
                variable.assign(value)

    keras.utils.clear_session()  # names count from one again
    keras.utils.set_random_seed(0)
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(256, WIDTH)(tokens)
    for _ in range(LAYERS):
        h = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(h, h, use_causal_mask=True)
        h = keras.layers.Dense(4 * WIDTH, activation="gelu")(keras.layers.LayerNormalization()(x))
        x = x + keras.layers.Dense(WIDTH)(h)
    model = keras.Model(tokens, keras.layers.Dense(256, name="lm_head")(keras.layers.LayerNormalization()(x)))
    losses = []
    model.compile(Optax(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    text = np.concatenate(list(itertools.islice(batches(), steps)))

    class Losses(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(logs["loss"] * (batch + 1) - sum(losses))  # Keras logs the mean since the epoch began

    model.fit(text[:, :-1], text[:, 1:], batch_size=BATCH, shuffle=False, callbacks=[Losses()], verbose=0)
    model.save(f"{folder}/model.keras")

    def trained(model):
        params = {variable.path: variable.value for variable in model.trainable_variables}
        return params, model.optimizer.structure.unflatten(variable.value for variable in model.optimizer.state)

    restored = keras.models.load_model(f"{folder}/model.keras", custom_objects={"Optax": Optax})
    return Run(losses, model.optimizer.tx, *trained(model), trained(restored))


def levanter(make: Make, rate: float, steps: int, folder: str) -> Run:
    """An ``OptimizerConfig`` that a YAML names by its type, and ``Trainer``, whose last checkpoint a second one finds."""
    import dataclasses

    import haliax
    from levanter.checkpoint import CheckpointerConfig
    from levanter.models.llama import LlamaConfig
    from levanter.models.lm_model import LmExample
    from levanter.optim.config import OptimizerConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    @OptimizerConfig.register_subclass(Path(folder).name)
    @dataclasses.dataclass(frozen=True)
    class OptaxConfig(OptimizerConfig):
        def build(self, num_train_steps):
            return make(self.lr_scheduler(num_train_steps))

    settings = TrainerConfig(
        id="run", num_train_steps=steps, train_batch_size=BATCH, tracker=NoopConfig(), require_accelerator=False,
        log_dir=Path(folder), checkpointer=CheckpointerConfig(base_path=folder), log_jaxprs=False, log_xla_hlo=False,
    )  # fmt: skip
    model = LlamaConfig(
        max_seq_len=LENGTH + 1, hidden_dim=WIDTH, intermediate_dim=4 * WIDTH, num_layers=LAYERS, num_heads=HEADS,
        num_kv_heads=2,
    )  # fmt: skip
    optimizer = OptaxConfig(learning_rate=rate, lr_schedule="constant", warmup=0).build(steps)

    def examples():
        for tokens in batches():
            yield haliax.vmap(LmExample.causal, "batch")(haliax.named(tokens, ("batch", model.max_Pos)))

    def loss(model, example, *, key):
        return model.compute_next_token_loss(example)

    losses, states = {}, []
    for seed in range(2):
        with Trainer(settings, optimizer, loss) as trainer:
            key = jax.random.PRNGKey(seed)
            state = trainer.initial_state(
                key, model_init=lambda key=key: model.build(haliax.Axis("vocab", 256), key=key)
            )
            trainer.add_hook(lambda info: losses.update({info.step: info.loss}))
            if not seed:
                state = trainer.train(state, examples()).state
            states.append((state.trainable_model, state.opt_state))
    return Run(list(losses.values()), optimizer, *states[0], states[1])


def maxtext(make: Make, rate: float, steps: int, folder: str) -> Run:
    """``get_optimizer`` makes MaxText's optimizer; another function in its place makes ours."""
    import json

    from flax import nnx
    from maxtext.configs import pyconfig
    from maxtext.input_pipeline import input_pipeline_interface
    from maxtext.optimizers import optimizers
    from maxtext.trainers.pre_train import train
    from maxtext.utils import train_utils

    made = []

    def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
        made.append(make(learning_rate_schedule))
        return made[-1]

    def create_data_iterator(config, mesh):
        shape = BATCH, LENGTH
        positions, ones = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape), np.ones(shape, np.int32)
        for_all = {"inputs_position": positions, "targets_position": positions}
        for_all |= {"inputs_segmentation": ones, "targets_segmentation": ones}
        return ({"inputs": text[:, :-1], "targets": text[:, 1:]} | for_all for text in batches()), None

    optimizers.get_optimizer = get_optimizer
    input_pipeline_interface.create_data_iterator = create_data_iterator
    settings = {
        "run_name": "run", "base_output_directory": folder, "metrics_file": f"{folder}/metrics.jsonl", "hardware": "cpu",
        "base_emb_dim": WIDTH, "base_mlp_dim": 4 * WIDTH, "base_num_decoder_layers": LAYERS, "base_num_query_heads": HEADS,
        "base_num_kv_heads": 2, "head_dim": WIDTH // HEADS, "vocab_size": 256, "max_target_length": LENGTH,
        "per_device_batch_size": BATCH, "dtype": "float32", "attention": "dot_product", "packing": False,
        "learning_rate": rate, "learning_rate_final_fraction": 1, "warmup_steps_fraction": 0, "gradient_clipping_threshold": 0,
        "dataset_type": "synthetic", "skip_jax_distributed_system": True, "enable_dropout": False, "log_config": False,
    }  # fmt: skip

    def trained(state):
        return nnx.filter_state(state["model"], nnx.Param), state["optimizer"]["opt_state"]

    state = train.train_loop(pyconfig.initialize(steps=steps, **settings), None)
    *_, restored = train_utils.setup_train_loop(pyconfig.initialize(steps=steps + 1, **settings), None)
    losses = [json.loads(line)["learning/loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return Run(losses, made[0], *trained(state), trained(nnx.state(restored)))


TRAINERS = {function.__name__: function for function in (tunix, keras, levanter, maxtext)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainer", choices=TRAINERS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-3, help="of AdamW, and of GaLore if --galore-rate is left out")
    parser.add_argument("--galore-rate", type=float)
    parser.add_argument("--rank", type=float, default=0.25, help="a fraction of the smaller side")
    parser.add_argument("--gap", type=int, default=200, help="steps between two refreshes of a basis")
    options = parser.parse_args()
    final = {}
    makers = {
        "adamw": optax.adamw,
        "galore_adamw": partial(galore_adamw, rank=options.rank, scale="rms", update_proj_gap=options.gap),
    }
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    for name, make in makers.items():
        os.makedirs(f"{folder.name}/{name}")
        rate = options.rate if name == "adamw" else options.galore_rate or options.rate
        run = TRAINERS[options.trainer](make, rate, options.steps, f"{folder.name}/{name}")
        described = describe(run.tx, run.params)
        if name != "adamw":
            print(described)
        final[name] = np.mean(run.losses[-10:])
        change = final[name] / final["adamw"] - 1
        print(f"{name:<12}  loss {final[name]:.4f} ({change:+.1%}), state {tree_bytes(run.state):,} bytes")
        if len(run.losses) != options.steps or tree_bytes(run.state) != described.state_bytes:
            raise SystemExit(f"{len(run.losses)} losses, and describe says {described.state_bytes:,} bytes")
        jax.tree.map(np.testing.assert_array_equal, run.restored, (run.params, run.state))
    print("a checkpoint restores bit for bit")


if __name__ == "__main__":
    main()
