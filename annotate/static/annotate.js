// Keys for the page: 1-4 and 7-0 choose, s goes through the safety labels, Enter submits, u undoes.
// Without this script everything works by Tab, arrows and buttons.
"use strict";
(() => {
  const compare = document.getElementById("compare");
  const undo = document.getElementById("undo");
  let looked = 0;
  let since = document.hidden ? null : performance.now();

  // Time counts while the page is seen.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && since !== null) {
      looked += performance.now() - since;
      since = null;
    } else if (!document.hidden) {
      since = performance.now();
    }
  });

  for (const form of document.forms) {
    form.addEventListener("submit", (event) => {
      if (form.dataset.sent) {
        event.preventDefault();
        return;
      }
      form.dataset.sent = "yes";
      const seconds = form.elements.namedItem("seconds");
      if (seconds) {
        const now = since === null ? 0 : performance.now() - since;
        seconds.value = ((looked + now) / 1000).toFixed(2);
      }
    });
  }
  // Back from the next page: the form can be sent again (and counts once all the same).
  window.addEventListener("pageshow", () => {
    for (const form of document.forms) {
      delete form.dataset.sent;
    }
  });

  // Where answers are being written, the page looks whether there is anything new, and shows it.
  if (document.getElementById("waits")) {
    let first = null;
    setInterval(async () => {
      try {
        const found = await (await fetch("/")).text();
        first ??= found;
        if (found !== first || !found.includes('id="waits"')) {
          location.reload();
        }
      } catch {
        // The server is being started again.
      }
    }, 1000);
  }

  const choose = (input) => {
    input.checked = true;
    input.focus();
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) {
      return;
    }
    if (event.target.closest("textarea, select, input[type=text]")) {
      return;
    }
    if (event.key === "u" && undo) {
      event.preventDefault();
      undo.requestSubmit();
      return;
    }
    if (!compare) {
      return;
    }
    const degree = [...compare.querySelectorAll("[data-key]")].find(
      (input) => input.dataset.key === event.key,
    );
    if (degree) {
      event.preventDefault();
      choose(degree);
    } else if (event.key === "s") {
      const labels = [...compare.querySelectorAll("[data-safe]")];
      const now = labels.findIndex((input) => input.checked);
      if (labels.length) {
        event.preventDefault();
        choose(labels[(now + 1) % labels.length]);
      }
    } else if (event.key === "Enter" && !event.target.closest("a, button, summary")) {
      event.preventDefault();
      compare.requestSubmit();
    }
  });
})();
