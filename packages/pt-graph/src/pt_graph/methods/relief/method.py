"""RELIEF: an ensemble of policies decides which nodes get a prompt, and what prompt."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from pt_core.data import Split
from pt_core.errors import InputError
from pt_core.frozen import call_with
from pt_core.method import Batch, Loss, Method, MethodConfig, Output
from pt_core.metrics import evaluate_logits
from pt_core.plan import FitConfig
from pt_core.training import FitResult, Loop, NotLearning, check_fit, described
from pt_graph.backbones import GraphBackbone, dropping, has_doubles
from pt_graph.method import GraphMethod, label_loss
from pt_graph.methods.relief.config import RELIEFConfig
from pt_graph.methods.relief.policy import ExactCritic, Policies, PooledCritic, critic_size
from pt_graph.methods.relief.ppo import RewardScaler, advantages, log_std_at, member_parts, remaining, standardise
from pt_graph.methods.relief.rollout import Episodes, Rollout, build_prompts, roll_out
from pt_graph.methods.relief.update import best_of_others, minibatch_losses
from pt_graph.walk import Walk


class RELIEF(GraphMethod):
    """RELIEF: reinforcement learning chooses, step by step, a node of a graph and the vector that is added to its features.

    A graph of n nodes has n steps. M policies of two small actors each are trained in turn by PPO, on the fall of the
    task loss that a step brings; each is held near the joint policy of all. After the policies, the head is trained on
    graphs that the joint policy has prompted; an epoch of the run is one such alternation.

    Graphs -> logits [B, C]. The joint policy draws the node (a node may be drawn again; its prompts add up) and adds the
    members' mean content. What it draws follows from the configuration's seed and the graph's sample id.

    Parameters: M (actor_d: d h + h + h (d // 4) + 2 (d // 4) + 1; actor_c: d h + h + h^2 + h + h D + D), h = d // 2, and
    the head. d = D = 300: 56,551 + 113,100 a member, 508,953 for M = 3. Node GIN, d = 128, D = 100: 10,369 + 18,916
    a member. The critic lives while the method is trained and is not part of it: with I = d N, a = int(0.05 I),
    b = int(0.025 I) it has I a + a + a b + 2b + 1 weights (d = 128, N = 150: 18,894,721), less those of nodes that no
    training graph has.

    Fidelity: the paper's body was not read; this follows the released code.

    - Kept although they look odd: rewards are standardised, so that a gain below the average is a loss; the first
      rollout of an epoch is counted twice in that mean; the density of a clamped content is not corrected; the discrete
      penalty is KL(joint || member), the continuous one KL(member || joint); nodes are drawn at prediction too; a rollout
      with no more transitions than a minibatch changes no policy (a warning tells).
    - `level` picks the defaults in which the two released programs differ: node level clamps contents to z_max, clips
      rewards to 0.1 and decays the head by 5e-4.
    - Corrected, and as released under `repo_compat`: BatchNorm stays in eval in the head phase (there, its statistics
      move; they are then this method's own, and the backbone's stay); rewards mask missing labels; an overlap that rounds
      to no graph shares none; float32, or what the backbone is if that is float64 (there: always float64).
    - Ours: draws come by inverting the distribution function; a ratio of densities that would overflow is cut; KL
      divergences normalise over real nodes, not padding; N of the critic is taken over training and validation graphs
      (`max_nodes` sets it); graphs without a label are dropped; above `critic_limit` weights the critic is `PooledCritic`,
      of 2.5 d^2 weights; the best epoch is picked by the run's `monitor` from `first_best_epoch` on, and the test split is
      not read before the end.
    - The run's optimiser, rate, weight decay and schedule are refused and its max_grad_norm has no effect: the method names
      its own.

    Reference: Zhu et al. RELIEF: Reinforcement Learning Empowered Graph Feature Prompt Tuning. KDD 2025. arXiv 2408.03195.
    """

    name = "relief"
    config_class = RELIEFConfig
    config: RELIEFConfig
    critic: ExactCritic | PooledCritic | None
    # Not trained by the loss of a batch; evaluation would build all prompts a second time for it.
    loss = Method.loss

    def __init__(self, backbone: GraphBackbone, config: MethodConfig | None = None) -> None:
        super().__init__(backbone, config)
        c = self.config
        self.policies = Policies(c.members, backbone.width, backbone.feature_width, c.z_max, self.generator)
        first = next((p for p in backbone.parameters() if p.is_floating_point()), None)
        self.dtype = (
            torch.float64 if c.repo_compat or (first is not None and first.dtype is torch.float64) else torch.float32
        )
        self.to(self.dtype)
        self.critic = None  # there while the method is trained: in checkpoints, not in artifacts
        if c.repo_compat:
            self.released = _ReleasedBackbone(backbone)

    # --- the frozen backbone --------------------------------------------------------------------------------------
    def embed(self, graphs: Any) -> Tensor:
        """Features X [n, D]."""
        return self.backbone.embed(graphs).to(self.dtype)

    def encode(self, x: Tensor, graphs: Any) -> Tensor:
        """Node embeddings [n, d]."""
        if self.config.repo_compat:
            return self.released.encode(x, graphs)
        first = next(self.backbone.parameters(), x)
        return self.backbone.encode(x.to(first.dtype), graphs).to(self.dtype)

    def _walk(self, x: Tensor, graphs: Any) -> Walk | None:
        first = next(self.backbone.parameters(), x)
        return None if self.config.repo_compat or first.dtype != x.dtype else self.backbone.walk(x, graphs)

    # --- prompts --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def prompts(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """Prompts P [n, D] of the joint policy; the prompted features are X + P.

        Args:
            batch: `graphs`, and `sample_ids` (default: positions).
            generator: what nodes are drawn by (on the CPU); default: the draws of a graph follow from the
                configuration's seed and its sample id, so that they are the same in every batch.
        """
        graphs = batch["graphs"]
        if generator is None:
            sizes = torch.bincount(graphs.batch, minlength=graphs.num_graphs).tolist()
            ids = batch.get("sample_ids", range(graphs.num_graphs))
            drawn = torch.cat([_draws(self.config.seed, i, n) for i, n in zip(ids, sizes, strict=True)])
        else:
            drawn = torch.rand(len(graphs.batch), generator=generator, dtype=torch.float64)
        return self._prompts(graphs, drawn)

    def _prompts(self, graphs: Any, uniform: Tensor) -> Tensor:
        x = self.embed(graphs)
        return build_prompts(Episodes(self.encode, x, graphs, self._walk), self.policies, _moved(uniform, x.device))

    def _logits(self, x: Tensor, graphs: Any) -> tuple[Tensor, Tensor]:
        features = self.backbone.readout(self.encode(x, graphs), graphs)
        return cast(nn.Module, self.head)(features), features

    def forward(self, batch: Batch) -> Output:
        """Logits [B, C] and embeddings [B, d] of the graphs with the joint policy's prompts."""
        graphs = batch["graphs"]
        return Output(*self._logits(self.embed(graphs) + self.prompts(batch), graphs))

    # --- what is trained ------------------------------------------------------------------------------------------
    def parameter_groups(self) -> list[dict[str, Any]]:
        """All groups, named "actor_d-0", "actor_c-0", ..., "head". The critic is in every member's optimiser."""
        members = (self._member_groups(m) for m in range(self.config.members))
        groups = [g | {"name": f"{g['name']}-{m}"} for m, of_member in enumerate(members) for g in of_member]
        return [*groups, self._head_group()]

    def _member_groups(self, m: int) -> list[dict[str, Any]]:
        c, member = self.config, list(self.policies)[m]
        groups = [
            {"name": "actor_d", "params": list(member.actor_d.parameters()), "lr": c.actor_d_lr},
            {"name": "actor_c", "params": list(member.actor_c.parameters()), "lr": c.actor_c_lr},
        ]
        return [g | {"schedule": c.policy_decay} for g in groups]

    def _head_group(self) -> dict[str, Any]:
        c, params = self.config, list(cast(nn.Module, self.head).parameters())
        return {
            "name": "head",
            "params": params,
            "lr": c.head_lr,
            "weight_decay": c.head_weight_decay,
            "schedule": c.head_decay,
        }

    def optimisers(self, config: FitConfig) -> dict[str, torch.optim.Optimizer]:
        """Adam "policy-0", ... (groups actor_d, actor_c and, while training, critic) and "head"."""
        made: dict[str, torch.optim.Optimizer] = {}
        for m in range(self.config.members):
            groups = self._member_groups(m)
            if self.critic is not None:
                params = list(self.critic.parameters())
                critic = {"name": "critic", "params": params, "lr": self.config.critic_lr}
                groups.append(critic | {"schedule": self.config.policy_decay})
            made[f"policy-{m}"] = torch.optim.Adam(groups, eps=1e-5, fused=True)
        return made | {"head": torch.optim.Adam([self._head_group()])}

    # --- training -------------------------------------------------------------------------------------------------
    def fit(
        self,
        train: Split,
        validation: Split | None = None,
        config: FitConfig | None = None,
        output_dir: str | Path | None = None,
    ) -> FitResult:
        """Train policies and head in turn; a step of the run is an epoch, `batch_size` the graphs of a rollout.

        The validation split is evaluated every `evaluate_every` epochs (default: 1 at graph level, 2 at node level) from
        `first_best_epoch` on, and after the last one; what is kept is the best of them.

        Raises:
            InputError: features, labels or sizes of the graphs do not fit, or a setting cannot be followed.
        """
        config, c = config or FitConfig(epochs=50), self.config
        check_fit(self, train, validation, config)
        if config.bucket_by_length or config.micro_batch_size:
            field = "bucket_by_length" if config.bucket_by_length else "micro_batch_size"
            raise InputError("a rollout is not split or bucketed", remedy="Leave it out", field=field)
        for field in ("optimiser", "momentum", "weight_decay", "schedule"):
            if getattr(config, field) != FitConfig.model_fields[field].default:
                raise InputError("has no effect: RELIEF names its own", remedy="Leave it out", field=field)
        sizes, labelled = self._survey(train, "training")
        others = self._survey(validation, "validation")[0] if validation is not None else []
        if len(labelled) < c.members:
            raise InputError(f"{len(labelled)} labelled training graphs for {c.members} members", field="members")
        columns = max(sizes[i] for i in labelled)
        nodes = c.max_nodes or max([columns, *others])
        self.critic = self._build_critic(nodes, columns, config.seed)
        total = config.max_steps or config.epochs or 1
        every = config.evaluate_every or (2 if c.level == "node" else 1)
        first = min(c.first_best_epoch, total)
        identity = {"train": described(train), "validation": None if validation is None else described(validation)}
        try:
            loop = Loop(self, config, output_dir, total_steps=total, identity=identity)
            order = shuffled(labelled, config.seed if c.split_seed is None else c.split_seed)
            parts = member_parts(order, c.members, c.overlap, c.repo_compat)
            self._short: int | None = None
            self.train()
            for epoch in loop.steps():
                if epoch == 1:
                    self._warm_up(loop, train, order)
                self._policy_phase(loop, epoch, train, parts)
                for _ in range(c.head_epochs):
                    for start in range(0, len(order), c.head_batch_size):
                        batch = loop.to_device(train.batch(order[start : start + c.head_batch_size]))
                        self._update_head(loop, batch, self._prompts(batch["graphs"], _uniform(batch["graphs"])))
                loop.training_done()
                if validation is not None and epoch >= first and (epoch % every == 0 or epoch == total):
                    loop.record(loop.evaluate(validation))
            return loop.finish()
        finally:
            self.critic = None

    def _survey(self, split: Split, what: str) -> tuple[list[int], list[int]]:
        """Sizes of the graphs, and the rows that have a label. Refuses what cannot be trained on, before training."""
        sizes: list[int] = []
        labelled: list[int] = []
        dropped: list[Any] = []
        for batch in split.batches(256):
            graphs, labels = batch["graphs"], batch["labels"]
            self.backbone.embed(send_to_device(graphs, next(self.backbone.parameters(), graphs.batch).device))
            found = torch.bincount(graphs.batch, minlength=graphs.num_graphs)
            if not bool((found > 0).all()):
                name = batch["sample_ids"][int(found.argmin())]
                raise InputError(f"graph {name!r} of the {what} split has no nodes", field="graphs")
            if labels.ndim == 1 and bool((labels >= self.config.num_outputs).any()):
                name = batch["sample_ids"][int(labels.argmax())]
                raise InputError(
                    f"graph {name!r} of the {what} split has label {int(labels.max())} of {self.config.num_outputs} classes",
                    field="labels",
                )
            label_loss(torch.zeros(len(labels), self.config.num_outputs), labels.clamp(min=0), self.config.task)
            known = (labels >= 0).view(len(labels), -1).any(1)
            at = len(sizes)
            sizes += found.tolist()
            labelled += [at + i for i, is_known in enumerate(known.tolist()) if is_known]
            dropped += [
                name for name, is_known in zip(batch["sample_ids"], known.tolist(), strict=True) if not is_known
            ]
        if dropped and what == "training":
            shown = ", ".join(map(repr, dropped[:10])) + (", ..." if len(dropped) > 10 else "")
            warnings.warn(f"{len(dropped)} training graphs have no label and are left out: {shown}", stacklevel=3)
        return sizes, labelled

    def _build_critic(self, nodes: int, columns: int, seed: int) -> ExactCritic | PooledCritic:
        c, width = self.config, self.backbone.width
        size = critic_size(width, nodes, columns)
        if c.critic == "pooled" or (c.critic == "auto" and size > c.critic_limit):
            if c.critic == "auto":
                warnings.warn(
                    f"graphs of up to {nodes} nodes: the exact critic would have {size:,} weights, more than critic_limit "
                    f"({c.critic_limit:,}). The pooled critic is used",
                    stacklevel=3,
                )
            return PooledCritic(width, seed).to(self.dtype)
        if size > c.critic_limit:
            raise InputError(
                f"graphs of up to {nodes} nodes: the exact critic has {size:,} weights, more than {c.critic_limit:,}",
                remedy='Use critic="pooled", leave large graphs out, or raise critic_limit',
                field="critic",
            )
        if columns > nodes:
            raise InputError(f"a training graph has {columns} nodes, more than max_nodes ({nodes})", field="max_nodes")
        return ExactCritic(width, nodes, columns, seed).to(self.dtype)

    def _policy_phase(self, loop: Loop, epoch: int, train: Split, parts: list[list[int]]) -> None:
        """Rollouts and updates of one member after the other; the head and the backbone are constants.

        Nothing that a member's first rollout depends on changes before its turn: those of all members are made at once.
        Their values, scaled rewards and updates follow in turn, as do a member's later rollouts.
        """
        c, size, scaler = self.config, loop.config.batch_size, RewardScaler()
        std = float(
            torch.tensor(log_std_at(epoch, loop.total_steps, c.log_std, c.final_log_std), dtype=torch.float64).exp()
        )
        entropy_weight = c.entropy_weight * remaining(epoch, loop.total_steps)
        orders = [[part[i] for i in torch.randperm(len(part)).tolist()] for part in parts]
        batches = [[order[i : i + size] for i in range(0, len(order), size)] for order in orders]

        def roll_out(rows: list[list[int]], members: Sequence[int]) -> list[Rollout]:
            acting = [m for m, own in zip(members, rows, strict=True) for _ in own]
            batch = loop.to_device(train.batch([i for own in rows for i in own]))
            return self._roll_out(batch, acting, std).split([len(own) for own in rows])

        first = roll_out([own[0] for own in batches], range(c.members))
        for m, own in enumerate(batches):
            for number, rows in enumerate(own):
                rollout = roll_out([rows], [m])[0] if number else first[m]
                with torch.no_grad():
                    values = cast(ExactCritic | PooledCritic, self.critic).all(rollout)
                    gain = advantages(scaler(rollout.reward), values, rollout.sizes.tolist(), c.gamma, c.gae_lambda)
                if len(rollout) > c.minibatch:
                    self._learn(loop, m, rollout, standardise(gain), gain + values, std, entropy_weight)
                else:
                    self._warn_short(len(rollout), len(rows))

    def _roll_out(self, batch: Batch, members: Sequence[int], std: float) -> Rollout:
        """Episodes on a batch, a member on each graph, with draws of torch's global generator."""
        c, graphs = self.config, batch["graphs"]
        x = self.embed(graphs)
        episodes = Episodes(self.encode, x, graphs, self._walk)
        labels = batch["labels"][episodes.order]

        def losses(h: Tensor, k: int) -> Tensor:
            logits = cast(nn.Module, self.head)(self.backbone.readout(h, episodes.view(k)))
            return reward_loss(logits, labels[:k], c.task, c.repo_compat)

        noise = torch.randn(x.shape, dtype=self.dtype)
        rollout = roll_out(
            episodes,
            self.policies,
            members,
            std,
            losses,
            _moved(_uniform(graphs), x.device),
            noise.to(x.device),
            c.clamp_content,
        )
        if c.reward_clip is not None:
            rollout.reward.clamp_(-c.reward_clip, c.reward_clip)
        return rollout

    def _learn(
        self, loop: Loop, m: int, rollout: Rollout, gain: Tensor, returns: Tensor, std: float, entropy_weight: float
    ) -> None:
        """At most `ppo_passes` passes over the transitions, until the policy has moved far enough."""
        c, critic = self.config, self.critic
        assert critic is not None
        others = best_of_others(self.policies, m, rollout) if c.members > 1 else None
        count = len(rollout) // c.minibatch
        fall = {"reward": rollout.reward.sum() / len(rollout.sizes)}  # of the loss of a graph over its episode
        for _ in range(c.ppo_passes):
            moved = torch.zeros(2, dtype=torch.float64)
            for rows in torch.randperm(len(rollout))[: count * c.minibatch].split(c.minibatch):
                rows = rows.to(gain.device)
                found = minibatch_losses(
                    self.policies, m, critic, rollout, others, rows, gain, returns, std, entropy_weight, c
                )
                loop.backward(Loss.mean(found.total, **found.parts, **fall))
                loop.update(f"policy-{m}", max_grad_norm=c.max_grad_norm)
                moved += torch.stack([found.kl_d, found.kl_c]).to(moved)
            if bool((moved / count > torch.tensor([c.target_kl_d, c.target_kl_c], dtype=moved.dtype)).any()):
                break

    def _warn_short(self, transitions: int, graphs: int) -> None:
        if self._short is None:
            self._short = transitions
            warnings.warn(
                f"a rollout of {graphs} graphs has {transitions} transitions, no more than a minibatch of "
                f"{self.config.minibatch}: no policy is trained by it. Set minibatch lower, or batch_size higher",
                NotLearning,
                stacklevel=4,
            )

    def _warm_up(self, loop: Loop, train: Split, order: Sequence[int]) -> None:
        """The head alone, on graphs without prompts, in batches of 32."""
        for _ in range(self.config.warmup_epochs):
            for rows in torch.randperm(len(order)).split(32):
                self._update_head(loop, loop.to_device(train.batch([order[i] for i in rows.tolist()])))

    def _update_head(self, loop: Loop, batch: Batch, prompts: Tensor | None = None) -> None:
        """One step of the head on graphs with these prompts."""
        graphs, on = batch["graphs"], self.config.backbone_dropout
        with torch.no_grad(), dropping(self.backbone, on), self._drift(on):
            x = self.embed(graphs)
            features = self.backbone.readout(self.encode(x if prompts is None else x + prompts, graphs), graphs)
        with loop.passes():
            logits = cast(nn.Module, self.head)(features)
        total, count = label_loss(logits, batch["labels"], self.config.task)
        loop.backward(Loss(total.sum(), count.sum(), {"head_loss": total.detach().sum()}), batch)
        loop.update("head", max_grad_norm=None)

    @contextmanager
    def _drift(self, on: bool) -> Iterator[None]:
        """`repo_compat`: BatchNorm in train mode, on this method's own copies of the statistics."""
        norms = [m for m in self.backbone.modules() if isinstance(m, nn.BatchNorm1d)] if on else []
        for norm in norms:
            norm.training = self.config.repo_compat
        try:
            yield
        finally:
            for norm in norms:
                norm.training = False


class _ReleasedBackbone(nn.Module):
    """A backbone in float64 whose BatchNorm statistics may move; its own tensors are left as they are.

    The statistics are buffers of this module, so they are kept with what is trained.
    """

    def __init__(self, backbone: GraphBackbone) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # no part of what is kept
        norms = [n for n, m in backbone.named_modules() if isinstance(m, nn.BatchNorm1d)]
        self.names = {
            f"{n}.{b}".replace(".", "/"): f"{n}.{b}"
            for n in norms
            for b, _ in backbone.get_submodule(n).named_buffers()
        }
        for own, name in self.names.items():
            value = backbone.get_buffer(name).detach().clone()
            self.register_buffer(own, value.double() if value.is_floating_point() else value)
        self.doubles: dict[str, Tensor] = {}

    def encode(self, x: Tensor, graphs: Any) -> Tensor:
        backbone = cast(GraphBackbone, self.backbone)
        if not self.doubles or next(iter(self.doubles.values())).device != x.device:
            self.doubles = {n: p.detach().double().to(x.device) for n, p in backbone.named_parameters()}
        own = {name: self.get_buffer(buffer) for buffer, name in self.names.items()}
        found: Tensor = call_with(backbone, self.doubles | own, backbone.encode, x, graphs)
        return found


def reward_loss(logits: Tensor, labels: Tensor, task: str, repo_compat: bool = False) -> Tensor:
    """Loss of each graph, the mean over its labels, [B].

    `repo_compat`: a missing label is a target of 0.5 whose loss is in the sum and not in the count.
    """
    if task == "multilabel" and repo_compat:
        target = torch.where(labels < 0, 0.5, labels.to(logits.dtype))
        terms = nn.functional.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
        return terms.sum(1) / (labels >= 0).sum(1)
    total, count = label_loss(logits, labels, task)
    return total / count


# --- metrics of prompts -----------------------------------------------------------------------------------------------
def prompt_metrics(prompts: Sequence[Tensor]) -> dict[str, float]:
    """Coverage and magnitude of the prompts of some graphs, [n_i, D] each.

    Returns:
        "pcr": mean over graphs of the share of nodes with a prompt; "apm": mean over these nodes of mean_j |P_vj| (0
        where there is none).
    """
    covered = [(p != 0).any(1) for p in prompts]
    sizes = torch.cat([p[c].abs().mean(1) for p, c in zip(prompts, covered, strict=True)])
    pcr = sum(float(c.double().mean()) for c in covered) / len(covered)
    return {"pcr": pcr, "apm": float(sizes.double().mean()) if len(sizes) else 0.0}


def with_prompt_metrics(split: Split) -> Split:
    """The split, scored by its own metrics and those of `prompt_metrics`, in one pass."""

    @torch.no_grad()
    def score(method: RELIEF, split: Split, batch_size: int) -> dict[str, float]:
        logits: list[Tensor] = []
        labels: list[Tensor] = []
        prompts: list[Tensor] = []
        device = next(method.parameters()).device
        for batch in split.batches(batch_size):
            labels.append(torch.as_tensor(batch["labels"]))
            batch = send_to_device(batch, device)
            graphs, found = batch["graphs"], method.prompts(batch)
            logits.append(method._logits(method.embed(graphs) + found, graphs)[0].float().cpu())
            prompts += found.cpu().split(torch.bincount(graphs.batch, minlength=graphs.num_graphs).tolist())
        scores = evaluate_logits(split.metrics, split.task, torch.cat(logits), torch.cat(labels), split.missing)
        return scores | prompt_metrics(prompts)

    return replace(split, scorer=score)


# --- draws ------------------------------------------------------------------------------------------------------------
def _draws(seed: int, sample_id: Any, size: int) -> Tensor:
    """Uniform draws of one graph, by seed and sample id."""
    number = int.from_bytes(hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()[:7])
    return torch.rand(size, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def _moved(uniform: Tensor, device: torch.device) -> Tensor:
    """Draws on a device, as doubles if it has them."""
    return uniform.to(device, uniform.dtype if has_doubles(device) else torch.float32)


def _uniform(graphs: Any) -> Tensor:
    """A uniform draw of torch's global generator for each node."""
    return torch.rand(len(graphs.batch), dtype=torch.float64)


def shuffled(rows: Sequence[int], seed: int) -> list[int]:
    """The rows in the order that `member_parts` cuts."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order.tolist()]
