"""RELIEF: reinforcement learning decides which nodes of a graph get a prompt, and what prompt.

`config` settings and published runs; `policy` networks; `ppo` arithmetic; `rollout` episodes; `update` losses of a
member; `method` RELIEF itself.
"""

from pt_graph.methods.relief.config import RELIEFConfig, setting, settings
from pt_graph.methods.relief.method import RELIEF, prompt_metrics, with_prompt_metrics

__all__ = ["RELIEF", "RELIEFConfig", "prompt_metrics", "setting", "settings", "with_prompt_metrics"]
