"""URLs of the test project: Django's and native ones, in one list."""

from asgiref.sync import sync_to_async
from django.conf.urls.i18n import i18n_patterns
from django.http import HttpResponse, JsonResponse
from django.middleware.csrf import get_token
from django.urls import include, path, re_path, reverse
from django.utils.translation import gettext_lazy

from django_aioserve.routes import aio_path
from tests.native_project import aio


def django_view(request, **kwargs):
    return HttpResponse(f"django {request.path} {sorted(kwargs.items())}")


def url_of_live(request):
    return HttpResponse(reverse("live", kwargs={"room": 5}) + " " + reverse("app:inner", args=[1]))


included = (
    [
        aio_path("<int:pk>/", aio.any_path, name="inner"),
        path("<slug:name>/", django_view),
    ],
    "app",
)


def user_of_django(request):
    return HttpResponse(request.user.get_username())


async def threads_of_django(request):
    return JsonResponse(await sync_to_async(aio.thread_and_connection)(), safe=False)


urlpatterns = [
    path("threads-of-django/", threads_of_django),
    path("", django_view, name="index"),
    path("accounts-of-django/", user_of_django),
    path("token-of-django/", lambda request: HttpResponse(get_token(request))),
    path("accounts/", include("django.contrib.auth.urls")),
    aio_path("delete-and-save/<str:key>/", aio.delete_and_save),
    path("url-of-live/", url_of_live),
    path("live/0/", django_view),
    aio_path("live/<int:room>/", aio.live, name="live"),
    path("live/<slug:room>/", django_view),
    aio_path("value/<uuid:key>/<path:rest>", aio.any_path, {"extra": 1}),
    path("in/<str:outer>/", include(included)),
    aio_path("things/<int:pk>/", aio.Things),
    aio_path("only-get/", aio.any_path, methods=["GET"]),
    aio_path("straße/", aio.any_path),
    *i18n_patterns(
        aio_path("language/", aio.language),
        aio_path(gettext_lazy("translated/"), aio.language),
        prefix_default_language=False,
    ),
    aio_path("own-language/", aio.own_language),
    re_path(r"^regex/(?P<year>[0-9]{4})/$", django_view),
    aio_path("regex/<str:year>/", aio.any_path),
    *[
        aio_path(f"{handler.__name__.replace('_', '-')}/", handler)
        for handler in (
            aio.adders,
            aio.adders_and_deleters,
            aio.adders_socket,
            aio.as_django,
            aio.both,
            aio.cache_objects,
            aio.cached,
            aio.chunked_users,
            aio.count,
            aio.count_in_socket,
            aio.count_in_stream,
            aio.counting_socket,
            aio.deaf_socket,
            aio.denied,
            aio.echo_socket,
            aio.events,
            aio.fail,
            aio.fail_in_socket,
            aio.fail_in_stream,
            aio.failing_events,
            aio.fast_heart,
            aio.flood_events,
            aio.flood_socket,
            aio.form,
            aio.greeting,
            aio.left_open,
            aio.lingering_events,
            aio.log_in,
            aio.log_out,
            aio.lost_events,
            aio.lost_page,
            aio.lost_poll,
            aio.lost_socket,
            aio.members,
            aio.members_api,
            aio.members_socket,
            aio.missing,
            aio.nothing,
            aio.own_limits_socket,
            aio.peek,
            aio.refused,
            aio.threads,
            aio.too_many_jobs,
            aio.users,
            aio.whoami,
            aio.wrong_events,
        )
    ],
]
