"""Importing this puts our optimal token baseline in the place of verl's, under verl's two names.

    VERL_USE_EXTERNAL_MODULES=trimtab.integrations.verl,trimtab.integrations.verl_replace_otb \\
        python -m verl.trainer.main_ppo trainer.use_v1=False \\
        algorithm.adv_estimator=optimal_token_baseline \\
        actor_rollout_ref.actor.calculate_sum_pi_squared=True

verl passes the statistics that it needs to these names alone, and its v1 trainer (the default of
0.9.1) not even to them: it never asks the actor for sum_pi_squared.
"""

from .verl import replace_estimators

replace_estimators("optimal_token_baseline", "tir_optimal_token_baseline")
