"""Plays rollouts of a `verifiers` environment: a script that the trainer starts, no module of it.

It runs under the interpreter of whatever environment has `verifiers`, so it imports nothing but the
standard library and that. One JSON object a line comes in on stdin and one goes out on stdout:

    {"do": "load", "id", "args"}             -> {"train", "heldout", "compares_groups"}
    {"do": "end"}                            -> {}
    {"do": "row", "split", "index"}          -> {"prompt", "tools", "columns"}
    {"do": "play", "groups", "timeout"}      -> {"turns": [{"rollout", "messages"}, ..]}
    {"replies": [{"rollout", "text", ..}]}   -> {"turns": ..}, at last {"rollouts": [..]}

`verifiers` runs the rollouts itself, as it would against a server; its client hands each turn to
the trainer, which has the policy and keeps the tokens. All rollouts that still live wait together.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
import time
from importlib.metadata import version
from typing import Any

Json = dict[str, Any]


class Worker:
    """Answers the trainer.

    Args:
        incoming: objects from the trainer.
        send: one object to it.
    """

    def __init__(self, incoming: asyncio.Queue[Json], send: Any) -> None:
        self.incoming, self.send = incoming, send
        self.environment: Any = None
        self.rows: dict[str, Any] = {}

    async def serve(self) -> None:
        """Answers for ever; the reader ends the process when the trainer is gone."""
        while True:
            asked = await self.incoming.get()
            try:
                answer = await getattr(self, asked.pop("do"))(**asked)
            except Exception as error:
                answer = {"error": one_line(error)}
            self.send(answer)

    async def load(self, id: str, args: Json) -> Json:
        """Loads the environment by name."""
        import verifiers

        found = version("verifiers")
        for name in ("load_environment", "Environment", "MultiTurnEnv"):
            if not hasattr(verifiers, name):
                raise ImportError(f"expected the interface of verifiers 0.1, {found} has no {name}")
        environment = verifiers.load_environment(id, **args)
        if not environment.score_rollouts:
            raise ValueError("expected an environment that scores its rollouts")
        if environment.provides_advantages:
            raise ValueError("expected an environment that leaves advantages to the trainer")
        own = {k: v for k, v in environment.sampling_args.items() if k != "n" and v}
        if own:
            tell(f"{id}: the trainer's sampling is used, the environment's is not: {own}")
        client_class()  # what it imports is part of the interface
        lose_failed_rewards()
        self.environment = environment
        train = environment.get_dataset()
        own = (environment.eval_dataset, getattr(environment, "eval_dataset_source", None))
        if any(part is not None for part in own):
            self.rows = {"train": train, "heldout": environment.get_eval_dataset()}
        elif len(train) >= 10:
            kept = [i for i in range(len(train)) if i % 10 != 9]
            self.rows = {"train": train.select(kept)}
            self.rows["heldout"] = train.select(range(9, len(train), 10))
        else:
            self.rows = {"train": train, "heldout": train}
            tell(
                f"{id} has fewer than ten rows and no eval_dataset: the held-out problems are the "
                "training ones"
            )
        sizes = {split: len(rows) for split, rows in self.rows.items()}
        if 0 in sizes.values():
            raise ValueError(f"expected a dataset with rows, got {sizes}")
        members = getattr(environment, "env_map", {}).values()
        compares = any(member.requires_group_rollouts for member in (environment, *members))
        return {"compares_groups": compares} | sizes

    async def end(self) -> Json:
        """Gives back what the environment holds beyond its rollouts, such as sandboxes."""
        environments = [self.environment]
        for environment in environments:
            await environment._teardown()
            environments += getattr(environment, "env_map", {}).values()
        return {}

    async def row(self, split: str, index: int) -> Json:
        """The problem of a row."""
        row = dict(self.rows[split][index])
        prompt = row.pop("prompt")
        prompt = prompt if isinstance(prompt, str) else as_conversation(prompt)
        info = row.get("info")
        info = json.loads(info) if isinstance(info, str) and info else info or {}
        tools = info["tool_defs"] if "tool_defs" in info else self.environment_of(info).tool_defs
        columns = {key: value for key, value in row.items() if is_json(value)}
        return {"prompt": prompt, "tools": as_schemas(tools), "columns": columns}

    def environment_of(self, info: Json) -> Any:
        """The member of a group of environments that plays a row; alone, the environment."""
        environment, route = self.environment, info.get("env_id") or []
        for name in [route] if isinstance(route, str) else route:
            if name in (members := getattr(environment, "env_map", {})):
                environment = members[name]
        return environment

    async def play(self, groups: list[Json], timeout: float) -> Json:
        """Plays and scores rollouts; the trainer answers their turns meanwhile."""
        rows = [dict(self.rows[group["split"]][group["index"]]) for group in groups]
        members = [group for group, asked in enumerate(groups) for _ in range(asked["n"])]
        table = Table(
            self.environment,
            [rows[group] for group in members],
            [(groups[group]["prompt"], groups[group]["tools"]) for group in members],
            timeout,
        )
        while turns := await table.turns():
            self.send({"turns": turns})
            table.reply((await self.incoming.get())["replies"])
        whole = [
            [i for i, other in enumerate(members) if other == group] for group in range(len(groups))
        ]
        await asyncio.gather(*(table.score(group, timeout * len(groups)) for group in whole))
        return {
            "rollouts": [
                {"reward": table.rewards.get(i), "error": table.errors.get(i)}
                for i in range(len(members))
            ]
        }


class Table:
    """Rollouts that are played together.

    Args:
        environment: of verifiers.
        rows: of its dataset, one a rollout.
        read: prompt and tools that the policy has read, of each.
        timeout: seconds that the environment may take between two turns.
    """

    def __init__(
        self, environment: Any, rows: list[Json], read: list[tuple[Any, Any]], timeout: float
    ) -> None:
        self.environment, self.read, self.timeout = environment, read, timeout
        self.states: dict[int, Any] = {}
        self.errors: dict[int, str] = {}
        self.rewards: dict[int, float] = {}
        self.waiting: dict[int, tuple[list[Json], asyncio.Future[Json | None]]] = {}
        self.changed = asyncio.Event()
        client = client_class()
        self.live = {
            i: asyncio.create_task(self.rollout(i, row, client(i, self)))
            for i, row in enumerate(rows)
        }

    async def rollout(self, i: int, row: Json, client: Any) -> None:
        """One rollout, from its row to its state."""
        try:
            state = await self.environment.rollout(row, client, "policy", {})
            if client.refused is not None:
                raise client.refused
            self.states[i] = state
        except Exception as error:
            self.errors[i] = one_line(error)
        finally:
            self.live.pop(i, None)
            self.waiting.pop(i, None)  # an environment may stop waiting for the policy
            self.changed.set()

    async def turn(self, i: int, messages: list[Json]) -> Json | None:
        """What the policy says after messages; None: it has no room to."""
        future = asyncio.get_running_loop().create_future()
        self.waiting[i] = (messages, future)
        self.changed.set()
        return await future

    async def turns(self) -> list[Json]:
        """What the policy is asked when all wait for it; nothing once all have ended."""
        deadline = time.monotonic() + self.timeout
        while len(self.waiting) < len(self.live):
            self.changed.clear()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self.changed.wait(), max(0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                for late in self.live.keys() - self.waiting.keys():
                    self.errors[late] = f"TimeoutError: no answer within {self.timeout:g} s"
                    self.live.pop(late).cancel()
        return [
            {"rollout": i, "messages": messages}
            for i, (messages, _) in sorted(self.waiting.items())
        ]

    def reply(self, replies: list[Json]) -> None:
        """Hands the policy's turns to their rollouts."""
        for reply in replies:
            if reply["rollout"] in self.waiting:
                _, future = self.waiting.pop(reply["rollout"])
                future.set_result(None if reply["text"] is None else reply)

    async def score(self, members: list[int], seconds: float) -> None:
        """Rewards of one group, by the environment's rubric, which has some time for it."""
        whole = [i for i in members if i in self.states]
        if not whole:
            return
        states, rubric = [self.states[i] for i in whole], self.environment.rubric
        try:
            await asyncio.wait_for(rubric.score_group(states), seconds)
            for i, state in zip(whole, states, strict=True):
                self.take_reward(i, state)
        except Exception as error:
            self.errors |= dict.fromkeys(whole, one_line(error))
        for state in states:
            with contextlib.suppress(Exception):
                await rubric.cleanup(state)

    def take_reward(self, i: int, state: Any) -> None:
        """The reward of a scored state, unless it is none."""
        from verifiers.errors import ToolError

        error, reward = state.get("error") or state.get(FAILED), state.get("reward")
        if error is not None and not isinstance(error, ToolError):  # those are the policy's doing
            self.errors[i] = one_line(error)
        elif not isinstance(reward, int | float) or not math.isfinite(reward):
            self.errors[i] = f"expected a finite reward, got {reward!r:.40}"
        elif state.get("timed_out"):
            self.errors[i] = "the environment's own time limit was reached"
        else:
            self.rewards[i] = float(reward)


FAILED = "trimtab_failed_reward"  # key of a state: the error of a reward function


def lose_failed_rewards() -> None:
    """Makes rubrics remember the errors of reward functions, which they would take for 0."""
    from verifiers import Rubric
    from verifiers.utils.async_utils import maybe_await

    def remembering(rubric: Any, function: Any, states: list[Any], check: Any) -> Any:
        @functools.wraps(function)  # by its signature it is told what it asks for
        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return check(await maybe_await(function, *args, **kwargs))
            except Exception as error:
                weights = zip(rubric.funcs, rubric.weights, strict=True)
                if any(weight for known, weight in weights if known is function):  # else a metric
                    for state in states:
                        state[FAILED] = error
                raise

        return call

    of_rollout, of_group = Rubric._call_individual_reward_func, Rubric._call_group_reward_func

    async def call_individual(self: Any, func: Any, state: Any) -> float:
        return await of_rollout(self, remembering(self, func, [state], float), state)

    async def call_group(self: Any, func: Any, states: list[Any]) -> list[float]:
        check = lambda rewards: [float(reward) for reward in rewards]
        return await of_group(self, remembering(self, func, states, check), states)

    Rubric._call_individual_reward_func = call_individual
    Rubric._call_group_reward_func = call_group


def client_class() -> type:
    """The class of clients that ask the trainer; made here, since verifiers is imported late."""
    from verifiers.clients import Client
    from verifiers.errors import OverlongPromptError
    from verifiers.types import Response, ResponseMessage, Usage

    class PolicyClient(Client):
        """One rollout's model."""

        def __init__(self, rollout: int, table: Table) -> None:
            super().__init__(None)
            self.rollout, self.table = rollout, table
            self.said: list[Json] = []  # the conversation so far
            self.turns = 0
            self.refused: Exception | None = None

        async def get_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any
        ) -> Any:
            messages = as_conversation(prompt)
            new = messages[len(self.said) :] if self.turns else []
            try:
                if sampling_args:
                    raise ValueError(f"expected the trainer's sampling, got {sampling_args}")
                if self.turns == 0:
                    refuse_other_prompt(messages, as_schemas(tools), *self.table.read[self.rollout])
                else:
                    refuse_rewritten(messages, self.said, new)
            except ValueError as refused:  # verifiers would take it for a server's error
                self.refused = refused
                raise OverlongPromptError from refused
            reply = await self.table.turn(self.rollout, new)
            if reply is None:
                raise OverlongPromptError("the rollout has no room for another turn")
            self.turns += 1
            content, calls = (
                parse_calls(reply["text"], self.turns) if tools else (reply["text"], [])
            )
            cut = reply["finish_reason"] == "length"
            message = ResponseMessage(
                content=content,
                tool_calls=calls or None,
                finish_reason="tool_calls" if calls and not cut else reply["finish_reason"],
                is_truncated=cut,
            )
            told = {"role": "assistant", "content": content, "tool_calls": calls or None}
            self.said = [*messages, as_chat(without_none(told))]
            counts = {key: reply[key] for key in ("prompt_tokens", "completion_tokens")}
            usage = Usage(**counts, reasoning_tokens=0, total_tokens=sum(counts.values()))
            return Response(
                id=f"{self.rollout}/{self.turns}",
                created=int(time.time()),
                model=model,
                usage=usage,
                message=message,
            )

        async def unused(self, *_: Any, **__: Any) -> Any:
            """What a client of a server is made of; `get_response` needs none of it."""
            raise NotImplementedError

        setup_client = to_native_tool = to_native_prompt = get_native_response = unused
        raise_from_native_response = from_native_response = unused

        async def close(self) -> None:
            pass

    return PolicyClient


def refuse_other_prompt(messages: list[Json], tools: Any, prompt: Any, offered: Any) -> None:
    """Raises unless an environment begins with what the policy has read."""
    if messages != as_conversation(prompt):
        raise ValueError(
            "expected a conversation that begins with the dataset's prompt, the environment begins "
            f"with {messages!r:.200}"
        )
    if tools != offered:
        raise ValueError(
            f"expected the tools of the dataset's row, the environment offers {tools!r:.200}"
        )


def refuse_rewritten(messages: list[Json], said: list[Json], new: list[Json]) -> None:
    """Raises unless a conversation goes on where it was: one rollout is one sequence of tokens."""
    if messages[: len(said)] != said:
        raise ValueError("expected a conversation that only grows, the environment rewrites it")
    if not new:
        raise ValueError("expected a reply between two turns of the policy, there is none")
    if any(message["role"] == "assistant" for message in new):
        raise ValueError("expected replies to the policy, the environment speaks as the assistant")


def parse_calls(text: str, turn: int) -> tuple[str, list[Json]]:
    """Tool calls in Hermes' form, `<tool_call>{"name": .., "arguments": {..}}</tool_call>`.

    Returns:
        The text before them, and the calls as verifiers has them. Without a whole call that is
        JSON: all of the text, and none.
    """
    before, *parts = text.split("<tool_call>")
    calls = []
    for part in parts:
        try:
            call = json.loads(part.partition("</tool_call>")[0])
            arguments = call["arguments"]
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments)
            identity = f"call_{turn}_{len(calls)}"
            calls.append({"id": identity, "name": str(call["name"]), "arguments": arguments})
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return (before, calls) if calls else (text, [])


TOOL_FIELDS = ("name", "description", "parameters")


def as_schemas(tools: Any) -> list[Json] | None:
    """Tools of verifiers in the form of chat templates; None without any."""
    from verifiers.types import Tool

    tools = [tool if isinstance(tool, Tool) else Tool.model_validate(tool) for tool in tools or []]
    schemas = [
        {"type": "function", "function": {key: getattr(tool, key) for key in TOOL_FIELDS}}
        for tool in tools
    ]
    return schemas or None


def as_conversation(messages: Any) -> list[Json]:
    """Messages as verifiers has them, or a text, in the form of chat templates."""
    from verifiers.utils.message_utils import normalize_messages

    normal = normalize_messages(messages)
    return [as_chat(without_none(as_dict(message))) for message in normal]


def as_dict(message: Any) -> Json:
    """A message as plain values."""
    return message if isinstance(message, dict) else message.model_dump()


def without_none(value: Any) -> Any:
    """Without the empty fields that a table's columns or a model's defaults add."""
    if isinstance(value, dict):
        return {key: without_none(part) for key, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


def as_chat(message: Json) -> Json:
    """A message in the form of chat templates: text contents, calls as functions."""
    content = message.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise ValueError("expected messages of text, got other contents")
        content = "".join(part["text"] for part in content)
    chat = message | {"content": content}
    if calls := message.get("tool_calls"):
        chat["tool_calls"] = [as_function(call) for call in calls]
    return chat


def as_function(call: Json) -> Json:
    """A call of verifiers in the form of chat templates, which want its arguments as values."""
    if "function" in call:
        return call
    arguments = call["arguments"]
    with contextlib.suppress(ValueError):
        arguments = json.loads(arguments)
    function = {"name": call["name"], "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": function}


def is_json(value: Any) -> bool:
    """Whether a value can be sent."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def tell(what: str) -> None:
    """Says what a user should know."""
    print(f"trimtab-rl: {what}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error, and what it came from, in one line."""
    parts = []
    cause: BaseException | None = error
    while cause is not None and len(parts) < 4:
        said = " ".join(str(cause).split())
        parts.append(type(cause).__name__ + (f": {said}" if said else ""))
        cause = cause.__cause__
    return "; from ".join(parts)[:500]


def main() -> None:
    """Serves until stdin ends; what environments print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    questions = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # what environments start would read the trainer's answers
    os.close(nothing)
    # the folder of this script, which Python puts first, has a `tree` and a `responses`, too
    beside = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [os.getcwd(), *(path for path in sys.path if os.path.realpath(path) != beside)]

    def send(answer: Json) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    async def run() -> None:
        incoming: asyncio.Queue[Json] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def read() -> None:
            for line in questions:
                loop.call_soon_threadsafe(incoming.put_nowait, json.loads(line))
            # the trainer is gone, or done: whatever an environment does or has started ends too
            os.killpg(0, signal.SIGKILL)

        threading.Thread(target=read, daemon=True).start()
        await Worker(incoming, send).serve()

    asyncio.run(run())


if __name__ == "__main__":
    main()
