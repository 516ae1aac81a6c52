"""Answers with a form: chains of two tool calls, the second of which needs what the first returned, and JSON by schema.

Tools are made up and answer the same always. All are offered to every chain, and codes that the second call needs stand
in the system prompt, so that what a model must get right lies far back, at the cache's final widths.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jsonschema import ValidationError, validate

from benchmarks.harness.tasks import Item

Call = dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """Two tools and what is asked of them.

    Attributes:
        find: name, description and argument of the tool that knows the identifier called ``key``.
        use: name, description and arguments, besides ``key``, of the tool that needs it.
        asked: questions with a name, {0}, and what else the second tool takes, {1}.
        names, choices: for {0} and {1}; each choice in words, and as the tool takes it.
    """

    find: tuple[str, str, str]
    key: str
    use: tuple[str, str, str]
    asked: tuple[str, str]
    names: tuple[str, ...]
    choices: dict[str, str | int]

    def definitions(self) -> list[dict[str, Any]]:
        """As SGLang's chat endpoint takes them."""
        kind = "integer" if isinstance(next(iter(self.choices.values())), int) else "string"
        key, (name, about, given), (user, use_about, other) = self.key, self.find, self.use
        return [
            _tool(name, f"{about} Returns the {key}, which is needed by {user}.", {given: "string"}),
            _tool(user, f"{use_about} The {key} comes from {name}; never guess it.", {key: "string", other: kind}),
        ]


def _tool(name: str, about: str, kinds: dict[str, str]) -> dict[str, Any]:
    properties = {key: {"type": kind, "description": f"the {key.replace('_', ' ')}"} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


SETS = (
    Tools(
        ("get_user_id", "Looks up a customer by full name.", "full_name"),
        "user_id",
        ("list_orders", "Lists the orders of a customer that have one status, given as a code.", "status_code"),
        ("Which orders of {0} are {1}?", "Please show me all {1} orders of our customer {0}."),
        ("Ada Lindqvist", "Bruno Castellani", "Chiara Novak", "Dmitri Okafor", "Elsa Brandt", "Farid Haddad"),
        {"shipped": "ST-40", "cancelled": "ST-91", "unpaid": "ST-17", "returned": "ST-68"},
    ),
    Tools(
        ("find_product", "Looks up a product of the catalogue by its name.", "product_name"),
        "sku",
        ("check_stock", "Says how many pieces of a product a warehouse holds.", "warehouse_code"),
        ("How many pieces of the {0} are in the warehouse in {1}?", "Is the {0} in stock in {1}?"),
        ("Walnut Desk", "Copper Kettle", "Linen Curtain", "Steel Bookshelf", "Wool Blanket", "Oak Stool"),
        {"Bergen": "BGO-4", "Hamburg": "HAM-2", "Lisbon": "LIS-7", "Gdansk": "GDN-1"},
    ),
    Tools(
        ("find_station", "Looks up a railway station by the name of its town.", "town"),
        "station_id",
        ("get_departures", "Lists the trains that leave a station, of one class of trains.", "train_class"),
        ("When do {1} leave from {0}?", "I am in {0}. Which {1} can I take?"),
        ("Salzburg", "Grenoble", "Utrecht", "Bologna", "Malmo", "Leuven"),
        {"night trains": "NT", "express trains": "EX", "regional trains": "RG", "freight trains": "FR"},
    ),
    Tools(
        ("find_book", "Looks up a book of the library by its title.", "title"),
        "isbn",
        ("reserve_copy", "Reserves a copy of a book at a branch of the library.", "branch_number"),
        ('Reserve "{0}" for me at the {1} branch.', 'I would like to pick up "{0}" at the {1} branch.'),
        ("The Glass Harbour", "A Winter Atlas", "Salt and Cedar", "The Ninth Lamp", "Quiet Engines", "Paper Rivers"),
        {"Northgate": 3, "Riverside": 8, "Old Town": 5, "Hill Street": 12},
    ),
)


def rules() -> str:
    """The system prompt."""
    lines = [
        f"- {set_.use[2]} of {set_.use[0]}: " + ", ".join(f"{word} is {code}" for word, code in set_.choices.items())
        for set_ in SETS
    ]
    return (
        "You are the assistant of a company with a shop, a library and a travel desk. You answer with tools, one call "
        "at a time: first look up the identifier, then call the tool that needs it. Never invent an identifier. Tools "
        "take codes, not words. These are the codes:\n" + "\n".join(lines)
    )


def shown() -> list[dict[str, Any]]:
    """A chain of each set as a conversation: a model that has no format of its own for calls learns it here."""
    said: list[dict[str, Any]] = []
    for n, set_ in enumerate(SETS):
        name, key, (word, code) = set_.names[-1], f"ZZ-{n}00{n}7{n}", list(set_.choices.items())[-1]
        said.append({"role": "user", "content": set_.asked[0].format(name, word)})
        for tool, given, found in (
            (set_.find[0], {set_.find[2]: name}, {set_.key: key}),
            (set_.use[0], {set_.key: key, set_.use[2]: code}, {"done": True}),
        ):
            function = {"name": tool, "arguments": json.dumps(given)}
            call = {"id": f"{tool}-{n}", "type": "function", "function": function}
            said.append({"role": "assistant", "content": "", "tool_calls": [call]})
            said.append({"role": "tool", "tool_call_id": call["id"], "content": json.dumps(found)})
        said.append({"role": "assistant", "content": "Done."})
    return said


@dataclass(frozen=True)
class Chain:
    """A question and its two right calls; ``found``: what the first returns.

    A client says what each call was answered with; how to judge is here.
    """

    first: Call
    second: Call
    found: str

    def respond(self, call: Call) -> str:
        """What the tool says."""
        return self.found if call == self.first else json.dumps({"error": "not found; check the arguments"})

    def judge(self, calls: int, text: str) -> bool:
        """Whether the first ``calls`` calls of a conversation are there and right."""
        return json.loads(text)[:calls] == [self.first, self.second][:calls]


def valid(text: str) -> bool:
    """Whether both turns had a call that could be parsed."""
    return len(json.loads(text)) == 2


def tool_chains(count: int, seed: int) -> list[Item]:
    """``count`` questions, each of which takes two calls, behind an example of each kind."""
    rng = random.Random(seed)
    tools = [tool for set_ in SETS for tool in set_.definitions()]
    items = []
    for n in range(count):
        set_ = SETS[n % len(SETS)]
        name, word = rng.choice(set_.names[:-1]), rng.choice(list(set_.choices))
        key = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2)) + "-" + str(rng.randrange(10**5, 10**6))
        first = {"name": set_.find[0], "arguments": {set_.find[2]: name}}
        second = {"name": set_.use[0], "arguments": {set_.key: key, set_.use[2]: set_.choices[word]}}
        chain = Chain(first, second, json.dumps({set_.key: key}))
        asked = rng.choice(set_.asked).format(name, word)
        messages = [{"role": "system", "content": rules()}, *shown(), {"role": "user", "content": asked}]
        parts: dict[str, Callable[[str], bool]] = {"valid": valid, "first call": partial(chain.judge, 1)}
        right = partial(chain.judge, 2)
        items.append(Item(messages, "", right, 128, parts=parts, tools=tools, respond=chain.respond))
    return items


# -- JSON by schema ------------------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "customer": {"type": "string", "maxLength": 40},
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {
                    "product": {"type": "string", "maxLength": 40},
                    "pieces": {"type": "integer", "minimum": 1, "maximum": 99},
                },
                "required": ["product", "pieces"],
                "additionalProperties": False,
            },
        },
        "warehouse": {"enum": list(SETS[1].choices)},
    },
    "required": ["customer", "items", "warehouse"],
    "additionalProperties": False,
}


def conforms(text: str) -> bool:
    """Whether a text is JSON of ``SCHEMA``."""
    try:
        validate(json.loads(text), SCHEMA)
    except (ValueError, ValidationError):
        return False
    return True


def says(order: dict[str, Any], text: str) -> bool:
    """Whether a text is JSON of ``SCHEMA`` that says ``order``."""
    return conforms(text) and json.loads(text) == order


def orders(count: int, seed: int, before: str) -> list[Item]:
    """Orders to be written as JSON of ``SCHEMA``, under the grammar backend; ``before`` is text that stands first."""
    rng = random.Random(seed)
    items = []
    for _ in range(count):
        order = {
            "customer": rng.choice(SETS[0].names),
            "items": [{"product": p, "pieces": rng.randrange(2, 60)} for p in rng.sample(SETS[1].names, 2)],
            "warehouse": rng.choice(list(SETS[1].choices)),
        }
        told = " and ".join(f"{item['pieces']} pieces of the {item['product']}" for item in order["items"])
        asked = (
            f"An order stands in the middle of these pages.\n\n{before}\n\nThe order: {order['customer']} takes {told} "
            f"from the warehouse in {order['warehouse']}.\n\n{before}\n\nWrite the order as JSON: customer, items "
            f"(product and pieces) and warehouse."
        )

        form = {"json_schema": json.dumps(SCHEMA)}
        messages = [{"role": "user", "content": asked}]
        items.append(Item(messages, "", partial(says, order), 160, parts={"valid": conforms}, params=form))
    return items
