"""The board in the admin."""

from django.contrib import admin

from board.models import Attachment, Message, Topic


class AttachmentInline(admin.TabularInline):
    model = Attachment
    extra = 0


@admin.register(Topic)
class TopicAdmin(admin.ModelAdmin):
    list_display = ["title", "created"]
    search_fields = ["title"]


@admin.register(Message)
class MessageAdmin(admin.ModelAdmin):
    list_display = ["author", "topic", "created"]
    list_filter = ["topic"]
    search_fields = ["author", "text"]
    inlines = [AttachmentInline]
