"""Pairs → a trained model: one loop, and an objective that says what is learnt.

pair_source   which rows a training reads              run_config, deepspeed_config   what it is configured with
data, draws   rows → tokens → the pairs of a step      loop, batch, engine            steps, records, DeepSpeed
objective     what the loop asks of what it trains     checkpoint, export             kill and continue; the result
  preference  a policy, by any of `losses`; selfchecks before the first step, optimizer_state after the last
  reward      a reward model, by `reward_losses`; calibration of its verdicts
  initial     the model either starts from
"""
