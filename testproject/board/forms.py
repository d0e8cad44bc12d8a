"""The form that writes a message, with a file if there is one."""

from pathlib import PurePath

from django import forms
from django.db import transaction

from board.models import Attachment, Message


class MessageForm(forms.ModelForm):
    file = forms.FileField(required=False)

    class Meta:
        model = Message
        fields = ["author", "text"]
        widgets = {"text": forms.Textarea(attrs={"rows": 3})}

    @transaction.atomic
    def save_to(self, topic):
        """Save the message in `topic`, and its attachment."""
        self.instance.topic = topic
        message = self.save()
        if upload := self.cleaned_data["file"]:
            Attachment.objects.create(message=message, file=upload, name=PurePath(upload.name).name)
        return message
