"""Whatever changes a message, be it a form, the chat or the admin, all open pages learn of it."""

from functools import partial

from django.db import transaction
from django.db.models import F
from django.db.models.signals import post_delete, post_save
from django.dispatch import receiver

from board.models import Change, Message, Topic
from django_aioserve import groups

#: The group of the pages that show something of every topic.
BOARD = "board"


def topic_group(pk):
    """The group of the pages that show the messages of one topic."""
    return f"topic:{pk}"


@receiver(post_save, sender=Message)
def message_saved(instance, raw, **kwargs):
    """Tell what the message is now. (A fixture brings the changes with it.)"""
    if not raw:
        content = {
            "author": instance.author,
            "text": instance.text,
            "created": instance.created.isoformat(),
        }
        if instance.key is not None:
            content["key"] = str(instance.key)
        _record(instance, content)


@receiver(post_delete, sender=Message)
def message_deleted(instance, origin, **kwargs):
    """Tell that the message is gone, unless its whole topic goes."""
    if not isinstance(origin, Topic) and getattr(origin, "model", None) is not Topic:
        _record(instance, {"deleted": True})


def _record(message, content):
    """Note a change, in the transaction that makes it, and tell of it once it is committed."""
    topics = Topic.objects.filter(pk=message.topic_id)
    topics.update(version=F("version") + 1)
    change = Change.objects.create(
        topic_id=message.topic_id,
        version=topics.values_list("version", flat=True).get(),
        content={"id": message.pk, **content},
    )
    transaction.on_commit(
        partial(groups.send_sync, topic_group(change.topic_id), change.as_event())
    )
    transaction.on_commit(partial(groups.send_sync, BOARD, {"topic": change.topic_id}))
