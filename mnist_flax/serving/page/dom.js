// What every part of the page needs of the document.
export const element = (id) => document.getElementById(id);
