"""`InProcessGrid`: Flower's Grid without Ray, sockets or processes. Unmodified ServerApps and ClientApps run on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE_ID = 1
CLIENTAPP_RAISED = 2


class InProcessGrid(Grid):
    """Calls the ClientApp directly, one node after the other, in the order of the messages.

    Node ids are stable: node k has the id k + 2. An exception in a ClientApp becomes an error reply, as in a SuperNode.
    """

    def __init__(self, client_app: ClientApp, node_configs: Sequence[UserConfig], run_config: UserConfig) -> None:
        """Set up one node per entry of `node_configs`; each keeps its own Flower context between messages."""
        self._client_app = client_app
        self._run = Run.create_empty(RUN_ID)
        self._contexts: Mapping[int, Context] = {
            node: Context(RUN_ID, node, dict(config), RecordDict(), dict(run_config))
            for node, config in enumerate(node_configs, start=SERVER_NODE_ID + 1)
        }
        self._run_config = dict(run_config)
        self._replies: dict[str, Message] = {}
        self._n_messages = 0
        # A Message can only be made where Flower knows who is speaking; a SuperLink's process sets this too.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SERVER_NODE_ID

    def server_context(self) -> Context:
        """Return the Flower context that a ServerApp is called with."""
        return Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), dict(self._run_config))

    def set_run(self, run: Run) -> None:
        """Set the run that messages belong to."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver each message at once and keep the reply."""
        ids = []
        for message in messages:
            self._n_messages += 1
            message_id = f"message-{self._n_messages}"
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._deliver(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver the messages one by one and yield each reply; everything is answered, so `timeout` never passes."""
        for message in messages:
            yield from self.pull_messages(self.push_messages([message]))

    def _deliver(self, message: Message) -> Message:
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            return Message(Error(code=CLIENTAPP_RAISED, reason="no such node"), reply_to=message)
        try:
            return self._client_app(message, context)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(code=CLIENTAPP_RAISED, reason=reason), reply_to=message)
