"""URLs of the project that the bridges are tested with."""

from __future__ import annotations

from django.urls import path

from tests.django_project import views

TWICE = [
    ("hello/", views.hello),
    ("describe/", views.describe),
    ("describe/<path:rest>", views.describe),
    ("form/", views.read_form),
    ("body/", views.read_body),
    ("some/", views.read_some),
    ("cookies/", views.cookies),
    ("status/<int:code>/", views.status),
    ("head/", views.head),
    ("size/<int:number>/", views.size),
    ("fail/<str:kind>/", views.fail),
    ("template/", views.template),
    ("nothing/", views.nothing),
    ("activate/", views.activate),
    ("active/", views.active),
    ("context/", views.context),
    ("answer/", views.answer),
    ("cache/", views.cache_identity),
    ("file/", views.file),
    ("memory-file/", views.memory_file),
    ("stream/", views.stream),
    ("stream-async/", views.stream_async),
    ("stream-size/<int:number>/", views.stream_size),
    ("endless/", views.endless),
    ("endless-async/", views.endless_async),
    ("silent-async/", views.silent_async),
    ("broken-stream/", views.broken_stream),
    ("broken-stream-async/", views.broken_stream_async),
    ("told/", views.told),
    ("wrapped-close/", views.wrapped_close),
    ("stream-connection/", views.stream_connection),
    ("stream-language/", views.stream_language),
    ("stream-in-transaction/", views.stream_in_transaction),
]

urlpatterns = [
    path(name, view) for route, twice in TWICE for name, view in views.both(route, twice)
] + [
    path("hold/", views.hold),
    path("wait/", views.wait),
    path("swallow/", views.swallow),
    path("timeout/", views.timeout),
    path("group/", views.group),
    path("calls-async/", views.calls_async),
    path("threads/", views.threads),
    path("stream-threads/", views.stream_threads),
    path("job-fails/", views.job_fails),
    path("connection/", views.connection_identity),
    path("async-connection/", views.async_connection_identity),
    path("add-group/", views.add_group),
    path("async-add-group/", views.async_add_group),
    path("async-groups/", views.async_groups),
    path("leave-open/", views.leave_open),
    path("query-slowly/", views.query_slowly),
    path("query-in-bits/", views.query_in_bits),
    path("query-once/", views.query_once),
    # The same paths lead elsewhere in other_urls.
    path("turned-async/", views.hello),
    path("turned-sync/", views.wait),
]
