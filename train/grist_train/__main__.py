"""The straight line: text -> tokens -> batches -> model -> loss -> optimizer -> checkpoint -> portable directory.

    python -m grist_train --config train/runs/quickstart.yaml [--dotted.key value ...]
    torchrun --nproc_per_node 8 -m grist_train --config ...            the same run on eight GPUs

Read it top to bottom: nothing is hidden behind a trainer class. Running the same command again resumes.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

from grist_train.config import TrainConfig, parse

if TYPE_CHECKING:
    from grist_train.distributed import World


def main(config: TrainConfig) -> None:
    """One run, from text to a portable model."""
    # 0) Imported here so that `--help` and a mistyped key answer at once.
    from grist_train import distributed
    from grist_train.guard import ExitCode, exit_for

    try:
        world = distributed.start(config.device, config.compute.threads)
        run(config, world)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on from the last checkpoint", file=sys.stderr)
        raise SystemExit(ExitCode.INTERRUPTED) from None
    except Exception as error:
        raise exit_for(error) from None
    finally:
        distributed.stop()


def run(config: TrainConfig, world: World) -> None:
    """One rank's part of a run."""
    import grist_model
    from grist_train import distributed, optimizer
    from grist_train.bad_steps import BadSteps
    from grist_train.checkpoint import Checkpoints
    from grist_train.context_parallel import own_share, share_routers, sharing_sequences, with_context
    from grist_train.expert_parallel import check_layout
    from grist_train.finish import finish
    from grist_train.gradient_norms import clip_by_group, gradient_groups
    from grist_train.guard import ExitCode, StopRequest, StorageError
    from grist_train.initial import add_adapters, check_base, fill, with_initial_model
    from grist_train.loss import step_values
    from grist_train.metrics import Metrics
    from grist_train.profiling import StepProfiler
    from grist_train.sample_log import SampleLog
    from grist_train.schedule import multiplier
    from grist_train.setup import announce, resumable
    from grist_train.step_guard import StepGuard, arm
    from grist_train.step_timer import StepTimer
    from grist_train.tasks import open_task
    from grist_train.watchdog import watched

    config = with_initial_model(config, world)
    check_layout(config.model, config.compute, world.size)
    world = with_context(world, config.compute)

    # 1) Text -> tokens, prepared once; later runs open what is there. Or pairs of answers, read into memory.
    task = open_task(config, world)
    kept = config.checkpoint
    checkpoints = Checkpoints(
        config.run_dir / "checkpoints",
        world,
        kept.keep_last,
        kept.asynchronous,
        kept.keep_every,
        kept.verify,
        kept.max_failures,
        kept.pinned,
    )
    state = checkpoints.newest()

    check_base(config, state)

    # 2) Model: shapes first, then sharding, then storage, then values: drawn from the seed, or those of another model.
    model = grist_model.build(config.model, device="meta")
    add_adapters(model, config, world)
    share_routers(model, world)
    distributed.prepare_blocks(model, config.compute)
    distributed.shard(model, world, config.compute)
    model.to_empty(device=world.device)
    fill(model, config, resuming=state is not None)
    optimizers = optimizer.build(model, config.optimizer)
    groups = gradient_groups(model, config.logging.grad_norm_by_layer)

    # 3) Resume from the newest whole checkpoint of this run, if there is one; batches go on where it left them.
    step = 0
    batches = task.batches(model, state)
    if state is not None:
        step = state["step"]
        checkpoints.load(step, model, optimizers)
    announce(config, world, model, step)

    # 4) The loop.
    guard = StepGuard(config.guard, world.device, state)
    bad = BadSteps(config, world, task.describe, state)
    metrics = Metrics(config, world, state, task.figures, groups, bad.read)
    seen = SampleLog(config, world, step)
    last_step = min(config.steps, config.stop_at or config.steps)
    reduce_sum = functools.partial(distributed.sum_on_device, world=world)
    stopped, held_out_loss = False, None
    timer, profiler = StepTimer(world.device), StepProfiler(config.profile, config.run_dir / "profile", world)
    with StopRequest(kept.deadline_seconds) as stop, watched(config.run_dir, world, config.watchdog_seconds) as heart:
        while step < last_step and not stopped:
            heart.at("data", step + 1)
            profiler.begin(step + 1)
            first = batches.position
            whole = next(batches)
            timer.mark("data")
            if step + 1 in bad.left_out:
                step += 1
                continue
            bad.begin(step + 1, first, batches.position)
            seen.record(step + 1, batches, whole)
            micro_batches = [own_share(batch, world) for batch in whole]
            rate = multiplier(step, config.steps, config.schedule)
            optimizer.set_learning_rate(optimizers, rate, step, config.optimizer)
            local_tokens = sum(batch.ids_BT.numel() for batch in micro_batches)
            local_counted = sum(batch.n_valid_tokens for batch in micro_batches)  # targets, or pairs
            votes = [local_tokens, local_counted, int(stop.reason is not None)]
            heart.at("ranks", step + 1)
            tokens, counted, stop_votes = distributed.sum_on_host(votes, world)
            stopped = stop_votes > 0
            timer.mark("ranks")  # waiting for them to come this far
            counted = max(counted, 1)  # rows cut out of conversations may hold no answer at all: nothing is learned

            results = []
            for i, batch in enumerate(micro_batches):
                distributed.set_last_micro_batch(model, i == len(micro_batches) - 1, config.compute)
                heart.at("forward", step + 1)
                with sharing_sequences(model, world):
                    result = task.loss(model, batch, counted, tokens)
                timer.mark("forward")
                heart.at("backward", step + 1)
                result.objective.backward()
                timer.mark("backward")
                results.append(result)

            heart.at("optimizer", step + 1)
            grad_norm, norms_G = clip_by_group(groups, config.optimizer.clip)
            values = step_values(results, grad_norm, counted, tokens, config.model, reduce_sum)
            skip = guard.judge(values[0], values[1])
            arm(optimizers, skip)
            for each in optimizers:
                each.step()
                each.zero_grad()
            timer.mark("optimizer")
            step += 1

            if config.model.balance == "bias" and config.model.experts and config.lora is None:
                assignments = config.model.layers * config.model.experts
                model.update_selection_bias((values[-assignments:] * ~skip).view(config.model.layers, -1))
            times = timer.lap()
            length = whole[0].ids_BT.shape[1]
            heart.at("metrics", step)
            metrics.step(step, config.optimizer.lr * rate, tokens, length, values, skip, norms_G, times)
            if profiler.end(step, times):
                metrics.pause()
                metrics.say(profiler.write())
                metrics.resume()
                timer.mark("profile")
            evaluate = task.has_held_out and config.evaluation_due(step)
            save = config.checkpoint.every and step % config.checkpoint.every == 0 and step < config.steps
            if evaluate or save:
                metrics.flush()
            if bad.too_many:
                state = bad.roll_back(model, optimizers, checkpoints, batches)
                step = state["step"]
                metrics.close()
                seen.close()
                guard = StepGuard(config.guard, world.device, state)
                metrics = Metrics(config, world, state, task.figures, groups, bad.read)
                seen = SampleLog(config, world, step)
                metrics.say(f"back to step {step}; left out from here on: steps {sorted(bad.left_out)}")
                continue

            held_out_loss = None
            if evaluate:
                metrics.pause()
                heart.at("evaluate", step)
                result = task.validate(model)
                held_out_loss = result["loss"]
                metrics.validation(step, result)
                metrics.resume()
                timer.mark("evaluation")
            heart.at("checkpoint", step)
            checkpoints.poll()
            if save:
                rest = resumable(step, task, metrics, guard, bad, held_out_loss, config)
                checkpoints.save(step, model, optimizers, rest)
                timer.mark("checkpoint")

        # 5) The last checkpoint; a run that was stopped ends here and goes on when the same command is run again.
        heart.at("checkpoint", step)
        metrics.flush()
        if profiler.has_something:
            metrics.say(profiler.write())
        bad.require_few()
        rest = resumable(step, task, metrics, guard, bad, held_out_loss, config)
        checkpoints.save(step, model, optimizers, rest)
        if not checkpoints.wait():
            raise StorageError(f"the last checkpoint (step {step}) could not be written; see the message above")
    if step < config.steps:
        reason = stop.reason or f"stop_at={config.stop_at}"
        metrics.say(f"{reason}: saved step {step} of {config.steps}. Run the same command again to go on.")
        metrics.close()
        seen.close()
        if stopped:
            raise SystemExit(ExitCode.STOPPED)
        return

    # 6) Held-out figures, the portable directory, samples and curves.
    finish(model, task, checkpoints, metrics, config, world)
    metrics.say(
        f"{metrics.seconds:.0f} s. Portable model: {config.run_dir / 'model'}; samples: {config.run_dir / 'samples.txt'}"
    )
    metrics.close()
    seen.close()


if __name__ == "__main__":
    sys.exit(main(parse()))
