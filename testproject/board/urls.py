"""URLs of the board, some of them served by aiohttp."""

from django.urls import path

from board import live, views, workload
from django_aioserve.routes import aio_path

urlpatterns = [
    path("", views.index, name="index"),
    path("topics/<int:pk>/", views.topic, name="topic"),
    path("topics/<int:pk>/chat/", views.chat, name="chat"),
    aio_path("topics/<int:topic>/events/", live.topic_events, name="topic-events"),
    aio_path("topics/<int:topic>/socket/", live.topic_chat, name="topic-socket"),
    aio_path("counts/", live.counts, name="counts", methods=["GET"]),
    path("attachments/<int:pk>/", views.attachment, name="attachment"),
    path("search/", views.search, name="search"),
    path("visits/", views.visits, name="visits"),
    path("api/topics/", views.topics_json, name="topics-json"),
    path("favicon.ico", views.favicon),
    # What a server is tried with.
    path("ping/", workload.ping),
    path("ping-async/", workload.ping_async),
    path("orm/", workload.orm),
    path("orm-async/", workload.orm_async),
    path("slow/", workload.slow),
    path("slow-async/", workload.slow_async),
    path("leak/", workload.leak),
    path("pid/", workload.pid),
    path("echo/", workload.echo),
    path("crash/", workload.crash),
    path("crash-async/", workload.crash_async),
    path("exit/", workload.exit_view),
    path("megabyte/", workload.megabyte),
    path("stream/", workload.stream),
    path("stream-async/", workload.stream_async),
    path("events/", workload.events),
    path("big-stream/", workload.big_stream),
    path("big-file/", workload.big_file),
]
