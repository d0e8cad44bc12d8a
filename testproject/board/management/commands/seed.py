"""Give an empty database something to show."""

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand
from django.db import transaction

from board.models import Message, Topic

TOPICS = {
    "Welcome": [
        ("ada", "This board is served by aiohttp, and the pages are Django's."),
        ("grace", "And the workers are replaced while you read."),
    ],
    "Memory": [
        ("barbara", "Where did it all go?"),
        ("edsger", "Ask /leak/?kb=1024 a few times, then look at the worker's size."),
    ],
    "Time": [("margaret", "/slow/?seconds=5 takes a thread, /slow-async/?seconds=5 takes none.")],
}


class Command(BaseCommand):
    help = "Make the superuser admin (password admin) and a few topics; does nothing twice."

    @transaction.atomic
    def handle(self, *args, **options):
        users = get_user_model().objects
        if not users.filter(username="admin").exists():
            users.create_superuser("admin", "admin@example.com", "admin")
        for title, messages in TOPICS.items():
            topic, made = Topic.objects.get_or_create(title=title)
            if made:
                # Without signals: there is nobody yet whom these messages would be new to.
                Message.objects.bulk_create(
                    Message(topic=topic, author=author, text=text) for author, text in messages
                )
        self.stdout.write("The board has its topics; log in at /admin/ as admin, password admin.")
