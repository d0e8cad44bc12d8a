"""The pages of the board, some of them async."""

from django.contrib.auth.decorators import login_required
from django.http import FileResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.templatetags.static import static
from django.views.decorators.http import require_GET, require_safe

from board.forms import MessageForm
from board.models import Attachment, Message, Topic


@require_safe
def index(request):
    """All topics; the numbers of their messages are kept up to date by a long poll."""
    return render(request, "board/index.html", {"topics": Topic.objects.with_numbers()})


def topic(request, pk):
    """A topic with its messages, kept up to date by an event stream, and the form for another."""
    # Its version is read before the messages: what is in both is told to the page once more.
    found = get_object_or_404(Topic, pk=pk)
    form = MessageForm(request.POST or None, request.FILES or None)
    if request.method == "POST" and form.is_valid():
        form.save_to(found)
        return redirect(found)
    messages = found.messages.prefetch_related("attachments")
    return render(request, "board/topic.html", {"topic": found, "posts": messages, "form": form})


@login_required
@require_safe
def chat(request, pk):
    """The same messages as a chat over a WebSocket."""
    found = get_object_or_404(Topic, pk=pk)
    posts = found.messages.prefetch_related("attachments")
    return render(request, "board/chat.html", {"topic": found, "posts": posts})


@require_safe
async def search(request):
    """Messages that contain a word; an async view with the async ORM."""
    query = request.GET.get("q", "").strip()
    found = []
    if query:
        hits = Message.objects.filter(text__icontains=query).select_related("topic")
        found = [message async for message in hits[:50]]
    return render(request, "board/search.html", {"query": query, "posts": found})


@require_safe
def attachment(request, pk):
    """Download a file that came with a message."""
    found = get_object_or_404(Attachment, pk=pk)
    return FileResponse(found.file.open("rb"), as_attachment=True, filename=found.name)


@require_safe
def visits(request):
    """Count this visitor's visits in the session."""
    count = request.session.get("visits", 0) + 1
    request.session["visits"] = count
    return render(request, "board/visits.html", {"visits": count})


@require_GET
def topics_json(request):
    """All topics with the number of their messages."""
    topics = [
        {"id": found.pk, "title": found.title, "messages": found.number}
        for found in Topic.objects.with_numbers()
    ]
    return JsonResponse({"topics": topics})


@require_safe
def favicon(request):
    """The icon, for pages that do not name it, such as the admin's."""
    return redirect(static("board/icon.svg"))
