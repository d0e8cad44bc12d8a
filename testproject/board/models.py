"""Topics, the messages in them, the files that come with a message, and what has changed."""

from django.db import models, transaction
from django.urls import reverse


class TopicQuerySet(models.QuerySet):
    def with_numbers(self):
        """With the number of messages as `number`."""
        # Where rows are counted, Meta.ordering does not apply.
        return self.annotate(number=models.Count("messages")).order_by("title")


class Topic(models.Model):
    title = models.CharField(max_length=100, unique=True)
    created = models.DateTimeField(auto_now_add=True)
    version = models.PositiveIntegerField(default=0, editable=False)
    """How many changes its messages have seen; see `Change`."""

    objects = TopicQuerySet.as_manager()

    class Meta:
        ordering = ["title"]

    def __str__(self):
        return self.title

    def get_absolute_url(self):
        return reverse("topic", args=[self.pk])


class Message(models.Model):
    topic = models.ForeignKey(Topic, on_delete=models.CASCADE, related_name="messages")
    author = models.CharField(max_length=50)
    text = models.TextField(max_length=2000)
    created = models.DateTimeField(auto_now_add=True)
    key = models.UUIDField(null=True, unique=True, editable=False)
    """Made by a page that may have to send the message twice, for want of an answer."""

    class Meta:
        ordering = ["created", "pk"]

    def __str__(self):
        return f"{self.author}: {self.text[:40]}"

    @transaction.atomic
    def save(self, *args, **kwargs):
        """Save it together with the `Change` that its signal makes."""
        super().save(*args, **kwargs)


class Attachment(models.Model):
    message = models.ForeignKey(Message, on_delete=models.CASCADE, related_name="attachments")
    file = models.FileField(upload_to="attachments/")
    name = models.CharField(max_length=200)

    def __str__(self):
        return self.name


class Change(models.Model):
    """That a message was saved or deleted: what a page that was away has missed.

    The changes of one topic are numbered 1, 2, 3 …, in the order in which they were
    committed: the number is taken from the topic's row, which stays locked until then. So whoever
    has all up to one of them can tell whether the next one is missing. (Primary keys cannot do
    that: a database may commit 7 after 8, and what is rolled back leaves a hole.)
    """

    topic = models.ForeignKey(Topic, on_delete=models.CASCADE, related_name="changes")
    version = models.PositiveIntegerField()
    content = models.JSONField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["topic", "version"], name="one_number_each")]
        ordering = ["version"]

    def __str__(self):
        return f"{self.topic_id}, {self.version}"

    def as_event(self):
        """What pages are told."""
        return {**self.content, "version": self.version}
