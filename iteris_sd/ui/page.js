// For the whole page: buttons that copy a link.
() => {
  document.addEventListener('click', async (event) => {
    const button = event.target.closest('button[data-copy]');
    if (!button) return;
    const link = document.querySelector(`.${button.dataset.copy}`);
    try {
      await navigator.clipboard.writeText(link.href);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Not allowed here: copy the link itself';
    }
  });
}
